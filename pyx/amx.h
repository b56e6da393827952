/* Products of pairs by matrix tiles: 16 x 16 sums over 16 pairs in one instruction, eight times the multiply-adds of the
 * vectors. Two by two sums at a time, so that each loaded tile is used twice. The left operand's rows must be
 * contiguous. Included by pairs.h.
 */
#include <amx_instructions.h>

#define EACH_SUM(DO)                  \
    {                                 \
        DO(0, c);                     \
        if (two_vectors)              \
            DO(1, c + 16);            \
        if (two_rows)                 \
            DO(2, c + 16 * ldc);      \
        if (two_rows && two_vectors)  \
            DO(3, c + 16 * ldc + 16); \
    }
#define LOAD(tile, place) MHA_TILE_LOAD(tile, place, 4 * ldc)
#define ZERO(tile, place) MHA_TILE_ZERO(tile)
#define STORE(tile, place) MHA_TILE_STORE(tile, place, 4 * ldc)

/* c[16 or 32][16 or 32] (+)= a[rows][16 steps pairs] b[16 steps pairs][lanes] */
MHA_INLINE void mha_tiles_sum(const int two_rows, const int two_vectors, ptrdiff_t steps, const uint16_t *a,
                              ptrdiff_t a_row, const float *b, ptrdiff_t ldb, float *c, ptrdiff_t ldc, int accumulate)
{
    const ptrdiff_t a_bytes = 2 * a_row, b_bytes = 4 * ldb;
    if (accumulate)
        EACH_SUM(LOAD)
    else
        EACH_SUM(ZERO)
    for (ptrdiff_t p = 0; p < steps; p++, a += 32, b += 16 * ldb) {
        MHA_TILE_LOAD(4, a, a_bytes);
        MHA_TILE_LOAD(6, b, b_bytes);
        MHA_TILE_PAIRS(0, 4, 6);
        if (two_vectors) {
            MHA_TILE_LOAD(7, b + 16, b_bytes);
            MHA_TILE_PAIRS(1, 4, 7);
        }
        if (two_rows) {
            MHA_TILE_LOAD(5, a + 16 * a_row, a_bytes);
            MHA_TILE_PAIRS(2, 5, 6);
        }
        if (two_rows && two_vectors)
            MHA_TILE_PAIRS(3, 5, 7);
    }
    EACH_SUM(STORE)
}
#undef EACH_SUM
#undef LOAD
#undef ZERO
#undef STORE

/* c[rows][16 vectors] (+)= a[rows][k pairs] b[k pairs][16 vectors], any number of rows: what whole tiles cover; the
 * vectors take the rows and the pairs that are left. Its thread is between mha_tiles_begin and mha_tiles_end. */
MHA_FUNCTION void pair_product(ptrdiff_t rows, ptrdiff_t vectors, ptrdiff_t k, const uint16_t *a, ptrdiff_t a_row,
                               ptrdiff_t a_k, const float *b, ptrdiff_t ldb, float *c, ptrdiff_t ldc, int accumulate)
{
    const ptrdiff_t steps = k / 16, whole = a_k == 2 && steps ? rows / 16 * 16 : 0, done = 16 * steps;
    MHA_TILES_SEE_MEMORY;
    for (ptrdiff_t j = 0; j < vectors; j += 2)
        for (ptrdiff_t i = 0; i < whole; i += 32) {
            const uint16_t *left = a + i * a_row;
            float *out = c + i * ldc + 16 * j;
            if (i + 16 == whole && j + 1 == vectors)
                mha_tiles_sum(0, 0, steps, left, a_row, b + 16 * j, ldb, out, ldc, accumulate);
            else if (i + 16 == whole)
                mha_tiles_sum(0, 1, steps, left, a_row, b + 16 * j, ldb, out, ldc, accumulate);
            else if (j + 1 == vectors)
                mha_tiles_sum(1, 0, steps, left, a_row, b + 16 * j, ldb, out, ldc, accumulate);
            else
                mha_tiles_sum(1, 1, steps, left, a_row, b + 16 * j, ldb, out, ldc, accumulate);
        }
    MHA_TILES_SEE_MEMORY;
    if (whole && done < k)
        tile_product_pairs(whole, vectors, k - done, a + 2 * done, a_row, a_k, b + done * ldb, ldb, c, ldc, 1);
    if (whole < rows)
        tile_product_pairs(rows - whole, vectors, k, a + whole * a_row, a_row, a_k, b, ldb, c + whole * ldc, ldc,
                           accumulate);
}

/* out[d][p] = x[p][d] for x[pairs][columns]: the values as a left operand. Both have room for whole tiles. */
MHA_FUNCTION void turn_pairs(ptrdiff_t pairs, ptrdiff_t columns, const uint32_t *x, uint32_t *out, ptrdiff_t out_row)
{
    for (ptrdiff_t p = 0; p < pairs; p += 16)
        for (ptrdiff_t d = 0; d < columns; d += 16) {
            mha_vector_f32 row[16];
            for (int i = 0; i < 16; i++)
                row[i] = v_load_f32((const float *)(x + (p + i) * columns + d));
            v_transpose_f32(row);
            for (int i = 0; i < 16; i++)
                v_store_f32((float *)(out + (d + i) * out_row + p), row[i]);
        }
}
