// delta = rowsum(grad_output * output), the row term of the softmax backward. A warp takes a row.
#include "storage.cuh"

constexpr int THREADS = 32 * MHA_WARPS;

KERNEL(THREADS) attention_delta(const __grid_constant__ AttentionParams p)
{
    const int64 row = (int64)blockIdx.x * MHA_WARPS + warp_index();
    if (row >= p.batch * p.heads * p.queries)
        return;
    const int64 i = row % p.queries, head = row / p.queries % p.heads, n = row / p.queries / p.heads;
    const Stored *output = (const Stored *)p.output.data + element(p.output, n, head, i);
    const Stored *grad = (const Stored *)p.grad_output.data + element(p.grad_output, n, head, i);
    Real sum = 0;
    for (int64 c = lane_index(); c < p.v_head_dim; c += 32)
        sum += to_real(output[c * p.output.column]) * to_real(grad[c * p.grad_output.column]);
#pragma unroll
    for (int other = 16; other > 0; other /= 2)
        sum += __shfl_xor_sync(0xffffffff, sum, other);
    if (lane_index() == 0)
        ((Real *)p.delta)[row] = sum;
}
