/* Sums beside those of the register tiles: lane by lane, and with terms left out. Template, included by lanes.h. */
#define LANES MHA_NAME(mha_lanes)
#define VECTOR MHA_NAME(mha_vector)
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
