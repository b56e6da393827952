/* A few queries against many keys: products of few rows, computed while keys and values come from memory, each read
 * once. Lanes are features. Template, included by lanes.h.
 *
 * What will be read some way on is asked for, a line or two at a time: a processor has places for some 30 lines that are
 * on their way, and stands still when it is asked for more. With one, four and eight query heads a key head of 128
 * features a thread takes 36, 39 and 43 ns a key; if it does not ask 37, 63 and 90; if several heads ask for keys while
 * they read values and the other way round 58 and 49. 6 to 16 KiB ahead are alike.
 */
#define LANES MHA_NAME(mha_lanes)
#define VECTOR MHA_NAME(mha_vector)
#define LINE (64 / (ptrdiff_t)sizeof(MHA_REAL))
#define AHEAD_BYTES 8192

/* The row that will be read AHEAD_BYTES after row `i` of x: past the end of x's `count` rows it is one of `next`, which are
 * taken to lie as far apart. */
MHA_INLINE const MHA_REAL *MHA_NAME(row_ahead)(ptrdiff_t i, ptrdiff_t count, ptrdiff_t columns, const MHA_REAL *x,
                                               ptrdiff_t row, const MHA_REAL *next)
{
    const ptrdiff_t there = i + AHEAD_BYTES / (columns * (ptrdiff_t)sizeof(MHA_REAL));
    return there < count ? x + there * row : next + (there - count) * row;
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
    for (; rows == 1 && d + 8 * LANES <= columns; d += 8 * LANES) {
        VECTOR right[8];
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++)
            right[i] = MHA_NAME(v_load)(x[0] + d + i * LANES);
#pragma GCC unroll 16
        for (int j = 0; j < keys; j++)
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++) {
                if (i * LANES % LINE == 0)
                    __builtin_prefetch(ahead + j * ahead_row + d + i * LANES);
                sum[j] += MHA_NAME(v_load)(key[j] + d + i * LANES) * right[i];
            }
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
                __builtin_prefetch(ahead + j * ahead_row + d);
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
 * lanes along d. `next` is what will be read after `key`; a hint. */
MHA_FUNCTION void MHA_NAME(tile_dots)(ptrdiff_t count, ptrdiff_t columns, const MHA_REAL *key, ptrdiff_t key_row,
                                      ptrdiff_t rows, const MHA_REAL *x, MHA_REAL *out, ptrdiff_t ldo,
                                      const MHA_REAL *next)
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
            const ptrdiff_t first = r * key_step / rows, asked = (r + row_step) * key_step / rows - first;
            const MHA_REAL *there = MHA_NAME(row_ahead)(j + first, count, columns, key, key_row, next);
            if (row_step == 1)
                MHA_NAME(dots_body)(LANES, 1, columns, keys, queries, made, LANES, there, key_row);
            else
                MHA_NAME(dots_body)(KEYS, MHA_NAME(dots_rows), columns, keys, queries, made, asked, there, key_row);
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

/* out[rows][vectors * LANES] += weight[rows][count] value[count][vectors * LANES]; of each row of `ahead` `lines` lines are
 * asked for. */
MHA_INLINE void MHA_NAME(values_body)(const int rows, const int vectors, ptrdiff_t count, const MHA_REAL *weight,
                                      ptrdiff_t weight_row, const MHA_REAL *value, ptrdiff_t value_row, MHA_REAL *out,
                                      ptrdiff_t out_row, const MHA_REAL *ahead, ptrdiff_t lines)
{
    VECTOR sum[4][8];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int i = 0; i < vectors; i++)
            sum[r][i] = (VECTOR){0};
    for (ptrdiff_t j = 0; j < count; j++) {
        VECTOR right[8];
#pragma GCC unroll 8
        for (int i = 0; i < vectors; i++)
            right[i] = MHA_NAME(v_load)(value + j * value_row + i * LANES);
        for (ptrdiff_t l = 0; l < lines; l++)
            __builtin_prefetch(ahead + j * value_row + l * LINE);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
            for (int i = 0; i < vectors; i++)
                sum[r][i] += weight[r * weight_row + j] * right[i];
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int i = 0; i < vectors; i++)
            *(VECTOR *)(out + r * out_row + i * LANES) += sum[r][i];
}

/* The same for any number of rows and vectors; `next` is what will be read after `value`; a hint. */
MHA_FUNCTION void MHA_NAME(tile_values)(ptrdiff_t vectors, ptrdiff_t count, const MHA_REAL *value, ptrdiff_t value_row,
                                        ptrdiff_t rows, const MHA_REAL *weight, ptrdiff_t weight_row, MHA_REAL *out,
                                        const MHA_REAL *next)
{
    enum { ROWS = 4, KEYS = 16, ROW_KEYS = 4 };
    /* One row has registers for eight vectors; what is wider is read in parts, a few keys at a time so that memory is still
     * read nearly in its order. */
    const int widest = rows == 1 ? 8 : MHA_TILE_VECTORS;
    const ptrdiff_t groups = (rows + ROWS - 1) / ROWS, step = rows > 1 ? KEYS : vectors > widest ? ROW_KEYS : count;
    for (ptrdiff_t j = 0; j < count; j += step)
        for (ptrdiff_t d = 0, across; d < vectors; d += across) {
            const ptrdiff_t keys = count - j < step ? count - j : step;
            across = vectors - d >= widest ? widest : vectors - d < MHA_TILE_VECTORS ? vectors - d : MHA_TILE_VECTORS;
            const ptrdiff_t lines = (across * LANES + groups * LINE - 1) / (groups * LINE);
            const MHA_REAL *ahead = MHA_NAME(row_ahead)(j, count, vectors * LANES, value, value_row, next) + d * LANES;
            for (ptrdiff_t g = 0; g < groups; g++) {
                const ptrdiff_t first = g * ROWS, left = rows - first < ROWS ? rows - first : ROWS;
#define CASE(r, v)                                                                                               \
    case 16 * r + v:                                                                                             \
        MHA_NAME(values_body)(r, v, keys, weight + first * weight_row + j, weight_row,                           \
                              value + j * value_row + d * LANES, value_row, out + (first * vectors + d) * LANES, \
                              vectors * LANES, ahead + g * lines * LINE, lines);                                 \
        break;
#define CASES(r) CASE(r, 1) CASE(r, 2) CASE(r, 3) CASE(r, 4)
                switch (16 * left + across) {
                    CASES(1)
                    CASES(2)
                    CASES(3)
                    CASES(4)
                    CASE(1, 8)
                }
#undef CASES
#undef CASE
            }
        }
}

#undef AHEAD_BYTES
#undef LINE
#undef VECTOR
#undef LANES
