// One kernel for each wrapper of prim.cuh: 32 threads take their operands from `input` and leave the results in `output`.
// MHA_CASE says which.
#include "params.cuh"
#include "prim.cuh"

struct ConformanceParams {
    const void *input;
    void *output;
};

enum Case {
    CONVERSIONS, // float -> float16, bfloat16, tf32 and back; pairs packed
    EXP2,
    LDMATRIX, // 4 matrices of 8 x 8 16-bit elements, plain and transposed
    MMA_FLOAT16,
    MMA_BFLOAT16,
    MMA_TF32,
    MMA_FLOAT64,
    COPIES // 16-byte copies of which 16 or 0 bytes are read
};

KERNEL(32) conformance(const __grid_constant__ ConformanceParams p)
{
    DYNAMIC_SHARED(memory);
    const int lane = threadIdx.x;
    if (MHA_CASE == CONVERSIONS) {
        const float x = ((const float *)p.input)[blockIdx.x * 64 + lane];
        const float y = ((const float *)p.input)[blockIdx.x * 64 + 32 + lane];
        uint32 *out = (uint32 *)p.output + (blockIdx.x * 32 + lane) * 8;
        out[0] = to_float16(x);
        out[1] = to_bfloat16(x);
        out[2] = __float_as_uint(from_float16(to_float16(x)));
        out[3] = __float_as_uint(from_bfloat16(to_bfloat16(x)));
        out[4] = __float_as_uint(infinity());
        out[5] = to_tf32(x);
        out[6] = pack_float16(x, y);
        out[7] = pack_bfloat16(x, y);
    }
    if (MHA_CASE == EXP2)
        ((float *)p.output)[blockIdx.x * 32 + lane] = exp2_fast(((const float *)p.input)[blockIdx.x * 32 + lane]);
    if (MHA_CASE == LDMATRIX) {
        for (int i = lane; i < 256; i += 32)
            ((uint16 *)memory)[i] = ((const uint16 *)p.input)[i];
        __syncthreads();
        uint32 r[4];
        ldmatrix_x4(r, shared_address(memory) + 16 * lane);
        for (int i = 0; i < 4; i++)
            ((uint32 *)p.output)[4 * lane + i] = r[i];
        ldmatrix_x4_trans(r, shared_address(memory) + 16 * lane);
        for (int i = 0; i < 4; i++)
            ((uint32 *)p.output)[128 + 4 * lane + i] = r[i];
    }
    if (MHA_CASE == MMA_FLOAT16 || MHA_CASE == MMA_BFLOAT16 || MHA_CASE == MMA_TF32) {
        const uint32 *in = (const uint32 *)p.input + (blockIdx.x * 32 + lane) * 10;
        const uint32 a[4] = {in[0], in[1], in[2], in[3]};
        float c[4];
        for (int i = 0; i < 4; i++)
            c[i] = __uint_as_float(in[6 + i]);
        if (MHA_CASE == MMA_FLOAT16)
            mma_float16(c, a, in[4], in[5]);
        else if (MHA_CASE == MMA_BFLOAT16)
            mma_bfloat16(c, a, in[4], in[5]);
        else
            mma_tf32(c, a, in[4], in[5]);
        for (int i = 0; i < 4; i++)
            ((float *)p.output)[(blockIdx.x * 32 + lane) * 4 + i] = c[i];
    }
    if (MHA_CASE == MMA_FLOAT64) {
        const double *in = (const double *)p.input + (blockIdx.x * 32 + lane) * 4;
        double c0 = in[2], c1 = in[3];
        mma_float64(c0, c1, in[0], in[1]);
        ((double *)p.output)[(blockIdx.x * 32 + lane) * 2] = c0;
        ((double *)p.output)[(blockIdx.x * 32 + lane) * 2 + 1] = c1;
    }
    if (MHA_CASE == COPIES) {
        const unsigned char *in = (const unsigned char *)p.input;
        copy_async(memory + 16 * lane, in + 16 * lane, lane % 3 ? 16 : 0);
        copy_async_commit();
        copy_async(memory + 512 + 16 * lane, in + 512 + 16 * lane, 16);
        copy_async_commit();
        copy_async_wait<1>();
        __syncthreads();
        for (int i = 0; i < 16; i++) // another lane's: the wait is for one's own, the barrier for everyone's
            ((unsigned char *)p.output)[16 * lane + i] = memory[16 * (31 - lane) + i];
        copy_async_wait<0>();
        __syncthreads();
        for (int i = 0; i < 16; i++)
            ((unsigned char *)p.output)[512 + 16 * lane + i] = memory[512 + 16 * (31 - lane) + i];
    }
}
