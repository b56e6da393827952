/* Sums beside those of the register tiles: along rows, lane by lane, and with terms left out. Template, included by
 * lanes.h.
 */
#define LANES MHA_NAME(mha_lanes)
#define VECTOR MHA_NAME(mha_vector)
/* Whether memory is read row by row, from end to end, and the processor's own guesses bring it: for one row of a group, of
 * few enough vectors. They are sooner than what is asked for, 25 GB/s of a core's 35 to 21; but with rows of 32 narrow
 * vectors, which are read in parts, it is 0.5 to 0.7 of the rate. */
MHA_INLINE int MHA_NAME(reads_whole_rows)(ptrdiff_t rows, ptrdiff_t columns)
{
    return rows == 1 && columns <= 16 * LANES;
}

/* keys x rows = LANES dot products at once: their partial sums fill a register each and are folded together. The first
 * `ahead_rows` rows at `ahead` are asked for meanwhile. */
MHA_INLINE void MHA_NAME(dots_body)(const int keys, const int rows, ptrdiff_t columns, const MHA_REAL *const *key,
                                    const MHA_REAL *const *x, MHA_REAL *out, ptrdiff_t ahead_rows,
                                    const MHA_REAL *ahead, ptrdiff_t ahead_row)
{
    VECTOR sum[LANES];
    ptrdiff_t d = 0;
#pragma GCC unroll 16
    for (int l = 0; l < LANES; l++)
        sum[l] = (VECTOR){0};
    /* Bound by memory: the fewer instructions a line takes, the further ahead loads are on their way. */
    for (; rows == 1 && !ahead_rows && d + 8 * LANES <= columns; d += 8 * LANES) {
        VECTOR right[8];
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++)
            right[i] = MHA_NAME(v_load)(x[0] + d + i * LANES);
#pragma GCC unroll 16
        for (int j = 0; j < keys; j++)
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++)
                sum[j] += MHA_NAME(v_load)(key[j] + d + i * LANES) * right[i];
    }
    for (; d + LANES <= columns; d += LANES) {
        VECTOR right[LANES];
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++)
            right[r] = MHA_NAME(v_load)(x[r] + d);
#pragma GCC unroll 16
        for (int j = 0; j < keys; j++) {
            const VECTOR left = MHA_NAME(v_load)(key[j] + d);
            if (j < ahead_rows)
                __builtin_prefetch(ahead + j * ahead_row + d, 0, 2);
#pragma GCC unroll 16
            for (int r = 0; r < rows; r++)
                sum[r * keys + j] += left * right[r];
        }
    }
    MHA_NAME(v_store)(out, MHA_NAME(v_sums)(sum));
    for (; d < columns; d++)
        for (int r = 0; r < rows; r++)
            for (int j = 0; j < keys; j++)
                out[r * keys + j] += key[j][d] * x[r][d];
}

enum { MHA_NAME(dots_rows) = LANES >= 16 ? 4 : LANES >= 4 ? 2 : 1 };

/* out[r * ldo + j] = sum over d of key[j][d] * x[r][d] for rows with contiguous columns: the scores of a few queries,
 * lanes along d. `ahead` is what will be read next, as many rows of as many columns; a hint. */
MHA_FUNCTION void MHA_NAME(tile_dots)(ptrdiff_t count, ptrdiff_t columns, const MHA_REAL *key, ptrdiff_t key_row,
                                      ptrdiff_t rows, const MHA_REAL *x, MHA_REAL *out, ptrdiff_t ldo,
                                      const MHA_REAL *ahead, ptrdiff_t ahead_row)
{
    enum { KEYS = LANES / MHA_NAME(dots_rows) };
    const ptrdiff_t row_step = rows == 1 ? 1 : MHA_NAME(dots_rows), key_step = LANES / row_step;
    for (ptrdiff_t j = 0; j < count; j += key_step)
        for (ptrdiff_t r = 0; r < rows; r += row_step) {
            const MHA_REAL *keys[LANES], *queries[LANES];
            MHA_REAL made[LANES];
            for (ptrdiff_t t = 0; t < key_step; t++)
                keys[t] = key + (j + t < count ? j + t : count - 1) * key_row;
            for (ptrdiff_t t = 0; t < row_step; t++)
                queries[t] = x + (r + t < rows ? r + t : rows - 1) * columns;
            /* A few at a time, as many in all as there are keys: see attention_decode. */
            const ptrdiff_t next = r * key_step / rows, next_rows = (r + row_step) * key_step / rows - next;
            const MHA_REAL *there = ahead + (j + next) * ahead_row;
            if (row_step == 1)
                MHA_NAME(dots_body)(LANES, 1, columns, keys, queries, made,
                                    MHA_NAME(reads_whole_rows)(rows, columns) ? 0 : LANES, there, ahead_row);
            else
                MHA_NAME(dots_body)(KEYS, MHA_NAME(dots_rows), columns, keys, queries, made, next_rows, there,
                                    ahead_row);
            if (row_step > 1 && r + row_step <= rows && j + key_step <= count) {
                for (ptrdiff_t t = 0; t < MHA_NAME(dots_rows); t++)
                    memcpy(out + (r + t) * ldo + j, made + t * KEYS, KEYS * sizeof(MHA_REAL));
                continue;
            }
            const ptrdiff_t made_keys = j + key_step < count ? key_step : count - j;
            for (ptrdiff_t t = 0; t < row_step && r + t < rows; t++)
                for (ptrdiff_t k = 0; k < made_keys; k++)
                    out[(r + t) * ldo + j + k] = made[t * key_step + k];
        }
}

MHA_INLINE void MHA_NAME(row_body)(const int vectors, ptrdiff_t count, const MHA_REAL *weight, const MHA_REAL *value,
                                   ptrdiff_t value_row, MHA_REAL *out)
{
    VECTOR sum[8];
#pragma GCC unroll 8
    for (int i = 0; i < vectors; i++)
        sum[i] = (VECTOR){0};
    for (ptrdiff_t j = 0; j < count; j++)
#pragma GCC unroll 8
        for (int i = 0; i < vectors; i++)
            sum[i] += weight[j] * MHA_NAME(v_load)(value + j * value_row + i * LANES);
#pragma GCC unroll 8
    for (int i = 0; i < vectors; i++)
        MHA_NAME(v_store)(out + i * LANES, MHA_NAME(v_load)(out + i * LANES) + sum[i]);
}

/* out[vectors * LANES] += weight[count] value[count][vectors * LANES]: tile_product of one row, but rows of `value` are
 * read from end to end. */
MHA_FUNCTION void MHA_NAME(row_product)(ptrdiff_t vectors, ptrdiff_t count, const MHA_REAL *weight,
                                        const MHA_REAL *value, ptrdiff_t value_row, MHA_REAL *out)
{
    for (; vectors >= 8; vectors -= 8, value += 8 * LANES, out += 8 * LANES)
        MHA_NAME(row_body)(8, count, weight, value, value_row, out);
    for (; vectors >= 4; vectors -= 4, value += 4 * LANES, out += 4 * LANES)
        MHA_NAME(row_body)(4, count, weight, value, value_row, out);
    for (; vectors > 0; vectors--, value += LANES, out += LANES)
        MHA_NAME(row_body)(1, count, weight, value, value_row, out);
}

/* Asks for rows that will be read soon, into the second cache; past the end of an array that is harmless. */
MHA_FUNCTION void MHA_NAME(fetch_rows)(ptrdiff_t rows, ptrdiff_t columns, const MHA_REAL *x, ptrdiff_t row)
{
    for (ptrdiff_t i = 0; i < rows; i++)
        for (ptrdiff_t d = 0; d < columns; d += 64 / (ptrdiff_t)sizeof(MHA_REAL))
            __builtin_prefetch(x + i * row + d, 0, 2);
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
