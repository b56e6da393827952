/* Register tiles: the one inner loop of the package.
 *
 *     c[m][lanes] (+)= sum over k of a(m, k) * b[k][lanes]
 *
 * `a` is read one scalar at a time and broadcast, so it may have any strides: a block of K, of V, of their
 * transposes or of a user's matrix is used where it lies. `b` and `c` are panels: rows of `vectors` * LANES
 * contiguous values, `ldb` and `ldc` apart. Rows of a tile times vectors of a tile fill the register file:
 * 8 x 3 and 6 x 4 AVX-512 accumulators reach 94 % of the FMA peak out of L1.
 *
 * The sum over one block is added to `c` at its end: over n terms that cancel, adding term by term to `c` would give a
 * constant error, 3.2e-8 of a mean over 40 000 keys in float32; sums of blocks have 0.4e-8.
 */
#define LANES MHA_NAME(mha_lanes)
#define VECTOR MHA_NAME(mha_vector)
MHA_INLINE void MHA_NAME(tile_body)(const int rows, const int vectors, ptrdiff_t k, const MHA_REAL *a, ptrdiff_t a_row,
                                    ptrdiff_t a_k, const MHA_REAL *b, ptrdiff_t ldb, MHA_REAL *c, ptrdiff_t ldc,
                                    int accumulate)
{
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
#pragma GCC unroll 12
        for (int i = 0; i < rows; i++) {
            const MHA_REAL left = a[i * a_row + p * a_k];
#pragma GCC unroll 4
            for (int j = 0; j < vectors; j++)
                sum[i][j] += left * right[j];
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

typedef void (*MHA_NAME(tile_function))(ptrdiff_t, const MHA_REAL *, ptrdiff_t, ptrdiff_t, const MHA_REAL *, ptrdiff_t,
                                        MHA_REAL *, ptrdiff_t, int);

#define TILE(rows, vectors)                                                                                       \
    static void MHA_NAME(tile_##rows##x##vectors)(ptrdiff_t k, const MHA_REAL *a, ptrdiff_t a_row, ptrdiff_t a_k, \
                                                  const MHA_REAL *b, ptrdiff_t ldb, MHA_REAL *c, ptrdiff_t ldc,   \
                                                  int accumulate)                                                 \
    {                                                                                                             \
        if (a_k == 1)                                                                                             \
            MHA_NAME(tile_body)(rows, vectors, k, a, a_row, 1, b, ldb, c, ldc, accumulate);                       \
        else if (a_row == 1)                                                                                      \
            MHA_NAME(tile_body)(rows, vectors, k, a, 1, a_k, b, ldb, c, ldc, accumulate);                         \
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
MHA_FUNCTION void MHA_NAME(tile_product)(ptrdiff_t rows, ptrdiff_t vectors, ptrdiff_t k, const MHA_REAL *a,
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

/* out[j] = sum over d of rows[j][d] * x[d] for rows with contiguous columns: the scores of one query, lanes along d. */
MHA_FUNCTION void MHA_NAME(tile_dots)(ptrdiff_t count, ptrdiff_t columns, const MHA_REAL *rows, ptrdiff_t row,
                                      const MHA_REAL *x, MHA_REAL *out)
{
    const ptrdiff_t whole = columns / LANES * LANES;
    for (ptrdiff_t j = 0; j < count; j++, rows += row) {
        VECTOR even = {0}, odd = {0};
        ptrdiff_t d = 0;
        for (; d + LANES < whole; d += 2 * LANES) {
            even += *(const VECTOR *)(rows + d) * *(const VECTOR *)(x + d);
            odd += *(const VECTOR *)(rows + d + LANES) * *(const VECTOR *)(x + d + LANES);
        }
        if (d < whole)
            even += *(const VECTOR *)(rows + d) * *(const VECTOR *)(x + d);
        even += odd;
        MHA_REAL sum = 0, part[LANES];
        *(VECTOR *)part = even;
        for (ptrdiff_t half = LANES / 2; half > 0; half /= 2)
            for (ptrdiff_t l = 0; l < half; l++)
                part[l] += part[l + half];
        for (d = whole; d < columns; d++)
            sum += rows[d] * x[d];
        out[j] = part[0] + sum;
    }
}

/* out[lanes] = sum over d of x[d][lanes] * y[d][lanes], in the order and with the rounding of tile_product: where one
 * key takes all the weight, delta equals that key's gradient to the bit, and their difference is the exact 0. */
MHA_FUNCTION void MHA_NAME(tile_lane_dots)(ptrdiff_t columns, ptrdiff_t vectors, const MHA_REAL *x, const MHA_REAL *y,
                                           MHA_REAL *out)
{
    for (ptrdiff_t v = 0; v < vectors; v++) {
        VECTOR sum = {0};
        for (ptrdiff_t d = 0; d < columns; d++)
            sum += *(const VECTOR *)(x + (d * vectors + v) * LANES) * *(const VECTOR *)(y + (d * vectors + v) * LANES);
        *(VECTOR *)(out + v * LANES) = sum;
    }
}

/* The same product, leaving out every term whose probability is exactly 0, so that an infinity or NaN behind a
 * hidden pair cannot leak as 0 * inf. For blocks that hold both hidden pairs and non-finite values; slow.
 * `b_is_probability` says which factor the probability is. */
MHA_FUNCTION void MHA_NAME(tile_product_hiding)(ptrdiff_t rows, ptrdiff_t vectors, ptrdiff_t k, const MHA_REAL *a,
                                                ptrdiff_t a_row, ptrdiff_t a_k, const MHA_REAL *b, ptrdiff_t ldb,
                                                MHA_REAL *c, ptrdiff_t ldc, int b_is_probability)
{
    for (ptrdiff_t i = 0; i < rows; i++) {
        VECTOR sum[4] = {{0}};
        MHA_REAL *const lane = (MHA_REAL *)sum;
        for (ptrdiff_t p = 0; p < k; p++) {
            const MHA_REAL left = a[i * a_row + p * a_k];
            if (!b_is_probability && left == 0)
                continue;
            for (ptrdiff_t l = 0; l < vectors * LANES; l++) {
                const MHA_REAL right = b[p * ldb + l];
                if (!b_is_probability || right != 0)
                    lane[l] += left * right;
            }
        }
        for (ptrdiff_t j = 0; j < vectors; j++)
            *(VECTOR *)(c + i * ldc + j * LANES) += sum[j];
    }
}

#undef VECTOR
#undef LANES
