/* Register tiles: the one inner loop of the package.
 *
 *     c[m][lanes] (+)= sum over k of a(m, k) * b[k][lanes]
 *
 * `a` is read one scalar at a time and broadcast, so it may have any strides: a block of K, of V, of their
 * transposes or of a user's matrix is used where it lies. `b` and `c` are panels: rows of `vectors` * LANES
 * contiguous values, `ldb` and `ldc` apart. Rows of a tile times vectors of a tile fill the register file:
 * 8 x 3 and 6 x 4 AVX-512 accumulators reach 99 % of the FMA peak out of L1.
 *
 * The sum over one block is added to `c` at its end: over n terms that cancel, adding term by term to `c` would give a
 * constant error, 3.2e-8 of a mean over 40 000 keys in float32; sums of blocks have 0.4e-8.
 *
 * Template, included by lanes.h for float32, float64 and the pairs of pairs.h, whose `a` is read two bfloat16 at a time.
 */
#ifndef MHA_LEFT
#define MHA_LEFT MHA_REAL
#define MHA_LOADED MHA_REAL
#define MHA_LOAD(p) (*(p))
#define MHA_NEXT 1
#define MHA_MULTIPLY_ADD(sum, left, right) ((sum) + (left) * (right))
#endif
#define LANES MHA_NAME(mha_lanes)
#define VECTOR MHA_NAME(mha_vector)
MHA_INLINE void MHA_NAME(tile_body)(const int rows, const int vectors, ptrdiff_t k, const MHA_LEFT *a, ptrdiff_t a_row,
                                    ptrdiff_t a_k, const MHA_REAL *b, ptrdiff_t ldb, MHA_REAL *c, ptrdiff_t ldc,
                                    int accumulate)
{
    const int ahead = MHA_FETCH_AHEAD && sizeof(MHA_LEFT) < sizeof(double);
    VECTOR sum[12][4];
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++)
            sum[i][j] = (VECTOR){0};
    for (ptrdiff_t p = 0; p < k; p++) {
        VECTOR right[4];
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++)
            right[j] = *(const VECTOR *)(b + p * ldb + j * LANES);
        /* Of the next tile: see MHA_FETCH_AHEAD in lanes.h. */
        if (ahead && a_k == MHA_NEXT)
            __builtin_prefetch(a + (rows + (p & 7)) * a_row + (p >> 3 << 3) * MHA_NEXT);
        else if (ahead && a_row == MHA_NEXT)
            __builtin_prefetch(a + rows * MHA_NEXT + p * a_k);
#pragma GCC unroll 12
        for (int i = 0; i < rows; i++) {
            const MHA_LOADED left = MHA_LOAD(a + i * a_row + p * a_k);
#pragma GCC unroll 4
            for (int j = 0; j < vectors; j++)
                sum[i][j] = MHA_MULTIPLY_ADD(sum[i][j], left, right[j]);
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++)
            if (accumulate)
                *(VECTOR *)(c + i * ldc + j * LANES) += sum[i][j];
            else
                *(VECTOR *)(c + i * ldc + j * LANES) = sum[i][j];
}

typedef void (*MHA_NAME(tile_function))(ptrdiff_t, const MHA_LEFT *, ptrdiff_t, ptrdiff_t, const MHA_REAL *, ptrdiff_t,
                                        MHA_REAL *, ptrdiff_t, int);

#define TILE(rows, vectors)                                                                                       \
    static void MHA_NAME(tile_##rows##x##vectors)(ptrdiff_t k, const MHA_LEFT *a, ptrdiff_t a_row, ptrdiff_t a_k, \
                                                  const MHA_REAL *b, ptrdiff_t ldb, MHA_REAL *c, ptrdiff_t ldc,   \
                                                  int accumulate)                                                 \
    {                                                                                                             \
        if (a_k == MHA_NEXT)                                                                                      \
            MHA_NAME(tile_body)(rows, vectors, k, a, a_row, MHA_NEXT, b, ldb, c, ldc, accumulate);                \
        else if (a_row == MHA_NEXT)                                                                               \
            MHA_NAME(tile_body)(rows, vectors, k, a, MHA_NEXT, a_k, b, ldb, c, ldc, accumulate);                  \
        else                                                                                                      \
            MHA_NAME(tile_body)(rows, vectors, k, a, a_row, a_k, b, ldb, c, ldc, accumulate);                     \
    }
/* clang-format off */
#define TILES(rows) TILE(rows, 1) TILE(rows, 2) TILE(rows, 3) TILE(rows, 4)
#define TILE_ROW(rows)                                                                                               \
    {                                                                                                                \
        0, MHA_NAME(tile_##rows##x1), MHA_NAME(tile_##rows##x2), MHA_NAME(tile_##rows##x3), MHA_NAME(tile_##rows##x4) \
    }
TILES(1) TILES(2) TILES(3) TILES(4) TILES(5) TILES(6) TILES(7) TILES(8) TILE(9, 1) TILE(10, 1) TILE(11, 1) TILE(12, 1)
TILE(9, 2) TILE(10, 2) TILE(11, 2) TILE(12, 2)
#undef TILES
#undef TILE

static const MHA_NAME(tile_function) MHA_NAME(tile_table)[12 + 1][4 + 1] = {
    {0}, TILE_ROW(1), TILE_ROW(2), TILE_ROW(3), TILE_ROW(4), TILE_ROW(5), TILE_ROW(6), TILE_ROW(7), TILE_ROW(8),
    {0, MHA_NAME(tile_9x1), MHA_NAME(tile_9x2)},   {0, MHA_NAME(tile_10x1), MHA_NAME(tile_10x2)},
    {0, MHA_NAME(tile_11x1), MHA_NAME(tile_11x2)}, {0, MHA_NAME(tile_12x1), MHA_NAME(tile_12x2)},
};
/* clang-format on */
#undef TILE_ROW

/* c[rows][vectors * LANES] (+)= a[rows][k] b[k][vectors * LANES], any number of rows. */
MHA_FUNCTION void MHA_NAME(tile_product)(ptrdiff_t rows, ptrdiff_t vectors, ptrdiff_t k, const MHA_LEFT *a,
                                         ptrdiff_t a_row, ptrdiff_t a_k, const MHA_REAL *b, ptrdiff_t ldb, MHA_REAL *c,
                                         ptrdiff_t ldc, int accumulate)
{
    static const int tile_rows[] = MHA_TILE_ROWS;
    const ptrdiff_t step = tile_rows[vectors];
    for (ptrdiff_t i = 0; i < rows; i += step) {
        const ptrdiff_t left = rows - i < step ? rows - i : step;
        MHA_NAME(tile_table)[left][vectors](k, a + i * a_row, a_row, a_k, b, ldb, c + i * ldc, ldc, accumulate);
    }
}

#undef VECTOR
#undef LANES
#undef MHA_LEFT
#undef MHA_LOADED
#undef MHA_LOAD
#undef MHA_NEXT
#undef MHA_MULTIPLY_ADD
