/* Products of bfloat16 whose sums are float32, two terms at a time: an operand lies as pairs of neighbours along k in 32
 * bits. One instruction takes 16 pairs where the processor has it, twice the multiply-adds of float32; its products are
 * exact, subnormals count as 0. Elsewhere converting whole blocks to float32 is faster: plans take pairs only where
 * MHA_PAIRED is 1. Where it has matrix tiles too, MHA_TILED, the left operand's rows are to be contiguous.
 */
#if defined(__AVX512BF16__)
enum { MHA_PAIRED = 1 };
#else
enum { MHA_PAIRED = 0 };
#endif

typedef mha_vector_f32 mha_vector_pairs;
enum { mha_lanes_pairs = mha_lanes_f32 };

MHA_INLINE uint32_t mha_two(const uint16_t *p)
{
    uint32_t both;
    memcpy(&both, p, 4);
    return both;
}

#if defined(__AVX512BF16__)
MHA_INLINE mha_vector_f32 mha_multiply_add_pairs(mha_vector_f32 sum, __m512i left, mha_vector_f32 right)
{
    return (mha_vector_f32)_mm512_dpbf16_ps((__m512)sum, (__m512bh)left, (__m512bh)right);
}
#define MHA_LOADED __m512i
#define MHA_LOAD(p) _mm512_set1_epi32((int)mha_two(p))
#else
MHA_INLINE mha_vector_f32 mha_multiply_add_pairs(mha_vector_f32 sum, uint32_t left, mha_vector_f32 right)
{
    const mha_bits_f32 high = (mha_bits_f32)right & (int32_t)0xffff0000;
    sum += mha_bits_to_float(left << 16) * (mha_vector_f32)((mha_bits_f32)right << 16);
    return sum + mha_bits_to_float(left & 0xffff0000) * (mha_vector_f32)high;
}
#define MHA_LOADED uint32_t
#define MHA_LOAD(p) mha_two(p)
#endif
#define MHA_LEFT uint16_t
#define MHA_NEXT 2
#define MHA_MULTIPLY_ADD(sum, left, right) mha_multiply_add_pairs(sum, left, right)
#define MHA_REAL float
#define MHA_NAME(name) name##_pairs
#include "tile.h"
#undef MHA_REAL
#undef MHA_NAME

#if defined(MHA_AMX)
enum { MHA_TILED = 1 };
#include "amx.h"
#else
enum { MHA_TILED = 0 };
MHA_INLINE void mha_tiles_begin(void) {}
MHA_INLINE void mha_tiles_end(void) {}
/* c[rows][vectors * LANES] (+)= a[rows][k pairs] b[k pairs][vectors * LANES], any number of rows; its thread is between
 * mha_tiles_begin and mha_tiles_end. */
#define pair_product tile_product_pairs
MHA_INLINE void turn_pairs(ptrdiff_t pairs, ptrdiff_t columns, const uint32_t *x, uint32_t *out, ptrdiff_t out_row) {}
#endif

/* out[p][l] = (x[2 p][l], x[2 p + 1][l]) rounded to bfloat16, for x[rows][width]; a last row alone is paired with zeros.
 * `out` may be `x`. */
MHA_FUNCTION void pair_rows(ptrdiff_t rows, ptrdiff_t width, const float *x, float *out)
{
    for (ptrdiff_t p = 0; 2 * p < rows; p++)
        for (ptrdiff_t l = 0; l < width; l += mha_lanes_f32) {
            const mha_vector_f32 low = v_load_f32(x + 2 * p * width + l);
            const mha_vector_f32 high =
                2 * p + 1 < rows ? v_load_f32(x + (2 * p + 1) * width + l) : (mha_vector_f32){0};
#if defined(__AVX512BF16__)
            const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
            const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7,
                                                   22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
            v_store_f32(out + p * width + l, (mha_vector_f32)_mm512_permutexvar_epi16(order, halves));
#else
            for (int i = 0; i < mha_lanes_f32; i++)
                out[p * width + l + i] =
                    mha_bits_to_float(mha_to_bfloat16(low[i]) | (uint32_t)mha_to_bfloat16(high[i]) << 16);
#endif
        }
}

/* out[i] = (even[i * stride], odd[i * stride]); `odd` NULL is zeros. */
MHA_FUNCTION void pair_values(ptrdiff_t count, const uint16_t *even, const uint16_t *odd, ptrdiff_t stride,
                              uint32_t *out)
{
    if (!odd)
        for (ptrdiff_t i = 0; i < count; i++)
            out[i] = even[i * stride];
    else if (stride == 1)
        for (ptrdiff_t i = 0; i < count; i++)
            out[i] = even[i] | (uint32_t)odd[i] << 16;
    else
        for (ptrdiff_t i = 0; i < count; i++)
            out[i] = even[i * stride] | (uint32_t)odd[i * stride] << 16;
}

/* Whether every one of these bfloat16 is finite. */
MHA_FUNCTION int pairs_finite(const uint16_t *x, ptrdiff_t count)
{
    int bad = 0;
    for (ptrdiff_t i = 0; i < count; i++)
        bad |= (x[i] & 0x7f80) == 0x7f80;
    return !bad;
}
