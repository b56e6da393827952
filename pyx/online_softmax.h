/* The softmax of a row, taken one tile of keys at a time (Milakov and Gimelshein, "Online normalizer calculation
 * for softmax", 2018). Lanes are queries, so everything here is vertical. Template, included by lanes.h.
 */
#define VECTOR MHA_NAME(mha_vector)
#define LANES MHA_NAME(mha_lanes)

/* What a score counts before the row's sum divides it. */
MHA_INLINE VECTOR MHA_NAME(v_probability)(VECTOR score, MHA_REAL scale, VECTOR shift)
{
    return MHA_NAME(v_exp)(MHA_NAME(v_scaled)(score, scale) - shift);
}

/* Turns the scores s[keys][width] into exp(scale * s - maximum), updates the running maximum and sum of every row and
 * says in `rescale` what the row's earlier sums must be multiplied by. Returns whether any factor is not 1.
 * A row that has seen no key keeps maximum -inf and sum 0. `scale` is positive.
 */
MHA_FUNCTION int MHA_NAME(softmax_absorb)(ptrdiff_t keys, ptrdiff_t vectors, MHA_REAL *s, MHA_REAL scale,
                                          MHA_REAL *maximum, MHA_REAL *sum, MHA_REAL *rescale)
{
    const ptrdiff_t width = vectors * LANES;
    const VECTOR none = MHA_NAME(v_set)((MHA_REAL)-INFINITY);
    int changed = 0;
    for (ptrdiff_t v = 0; v < vectors; v++) {
        MHA_REAL *column = s + v * LANES;
        const VECTOR before = MHA_NAME(v_load)(maximum + v * LANES);
        VECTOR most = none, other = none;
        ptrdiff_t j = 0;
        for (; j + 1 < keys; j += 2) {
            most = MHA_NAME(v_max)(MHA_NAME(v_load)(column + j * width), most);
            other = MHA_NAME(v_max)(MHA_NAME(v_load)(column + (j + 1) * width), other);
        }
        if (j < keys)
            most = MHA_NAME(v_max)(MHA_NAME(v_load)(column + j * width), most);
        most = MHA_NAME(v_max)(MHA_NAME(v_scaled)(MHA_NAME(v_max)(other, most), scale), before);
        const VECTOR base = MHA_NAME(v_select)(most == none, (VECTOR){0}, most);
        const VECTOR factor = MHA_NAME(v_exp)(before - base);
        VECTOR even = {0}, odd = {0};
        for (j = 0; j + 1 < keys; j += 2) {
            const VECTOR p = MHA_NAME(v_probability)(MHA_NAME(v_load)(column + j * width), scale, base);
            const VECTOR q = MHA_NAME(v_probability)(MHA_NAME(v_load)(column + (j + 1) * width), scale, base);
            MHA_NAME(v_store)(column + j * width, p);
            MHA_NAME(v_store)(column + (j + 1) * width, q);
            even += p;
            odd += q;
        }
        if (j < keys) {
            const VECTOR p = MHA_NAME(v_probability)(MHA_NAME(v_load)(column + j * width), scale, base);
            MHA_NAME(v_store)(column + j * width, p);
            even += p;
        }
        MHA_NAME(v_store)(maximum + v * LANES, most);
        MHA_NAME(v_store)(rescale + v * LANES, factor);
        MHA_NAME(v_store)(sum + v * LANES, MHA_NAME(v_load)(sum + v * LANES) * factor + (even + odd));
        for (ptrdiff_t l = 0; l < LANES; l++)
            changed |= factor[l] != 1;
    }
    return changed;
}

/* x[rows][width] *= factor[width] */
MHA_FUNCTION void MHA_NAME(scale_lanes)(ptrdiff_t rows, ptrdiff_t vectors, MHA_REAL *x, const MHA_REAL *factor)
{
    for (ptrdiff_t i = 0; i < rows; i++)
        for (ptrdiff_t v = 0; v < vectors; v++, x += LANES)
            MHA_NAME(v_store)(x, MHA_NAME(v_load)(x) * MHA_NAME(v_load)(factor + v * LANES));
}

/* s -> exp(scale * s - shift) * row_scale, lanes are queries, `shift` and `row_scale` one value a lane; row_scale NULL is
 * 1. What is hidden gives 0 even in a row that another key has made NaN; rows without a key carry shift = +inf and give
 * 0 too. */
MHA_FUNCTION void MHA_NAME(softmax_replay)(ptrdiff_t keys, ptrdiff_t vectors, MHA_REAL *s, MHA_REAL scale,
                                           const MHA_REAL *shift, const MHA_REAL *row_scale)
{
    const VECTOR none = MHA_NAME(v_set)((MHA_REAL)-INFINITY), zero = {0};
    for (ptrdiff_t j = 0; j < keys; j++)
        for (ptrdiff_t v = 0; v < vectors; v++, s += LANES) {
            const VECTOR score = MHA_NAME(v_load)(s);
            VECTOR p = MHA_NAME(v_probability)(score, scale, MHA_NAME(v_load)(shift + v * LANES));
            if (row_scale)
                p *= MHA_NAME(v_load)(row_scale + v * LANES);
            MHA_NAME(v_store)(s, MHA_NAME(v_select)(score == none, zero, p));
        }
}

/* The same where lanes are keys: one shift and one row_scale for the whole row of the tile. */
MHA_FUNCTION void MHA_NAME(softmax_replay_row)(ptrdiff_t vectors, MHA_REAL *s, MHA_REAL scale, MHA_REAL shift,
                                               MHA_REAL row_scale)
{
    const VECTOR none = MHA_NAME(v_set)((MHA_REAL)-INFINITY), zero = {0};
    for (ptrdiff_t v = 0; v < vectors; v++, s += LANES) {
        const VECTOR score = MHA_NAME(v_load)(s);
        const VECTOR p = MHA_NAME(v_probability)(score, scale, MHA_NAME(v_set)(shift)) * row_scale;
        MHA_NAME(v_store)(s, MHA_NAME(v_select)(score == none, zero, p));
    }
}

/* ds = p * (dp - delta), and exactly 0 where p is 0: what a hidden pair holds never matters.
 * `delta` is one value a lane (step LANES) or one for the whole row (step 0, then delta[0] is taken). */
MHA_FUNCTION void MHA_NAME(softmax_gradient)(ptrdiff_t rows, ptrdiff_t vectors, const MHA_REAL *p, MHA_REAL *dp,
                                             const MHA_REAL *delta, int delta_is_per_row)
{
    for (ptrdiff_t i = 0; i < rows; i++)
        for (ptrdiff_t v = 0; v < vectors; v++, p += LANES, dp += LANES) {
            const VECTOR subtract = delta_is_per_row ? MHA_NAME(v_set)(delta[i]) : MHA_NAME(v_load)(delta + v * LANES);
            const VECTOR x = MHA_NAME(v_load)(p);
            const VECTOR g = x * (MHA_NAME(v_load)(dp) - subtract);
            MHA_NAME(v_store)(dp, MHA_NAME(v_select)(x == (VECTOR){0}, (VECTOR){0}, g));
        }
}

/* One row of scores whose lanes are keys: s -> exp(scale * s - maximum), with the running maximum and sum of the row.
 * Returns what the row's earlier sums must be multiplied by. */
MHA_FUNCTION MHA_REAL MHA_NAME(softmax_absorb_row)(ptrdiff_t vectors, MHA_REAL *s, MHA_REAL scale, MHA_REAL *maximum,
                                                   MHA_REAL *sum)
{
    VECTOR most = MHA_NAME(v_set)((MHA_REAL)-INFINITY), total = {0};
    MHA_REAL top = *maximum, added = 0;
    for (ptrdiff_t v = 0; v < vectors; v++)
        most = MHA_NAME(v_max)(MHA_NAME(v_load)(s + v * LANES), most);
    most = MHA_NAME(v_scaled)(most, scale);
    for (ptrdiff_t l = 0; l < LANES; l++)
        top = most[l] > top ? most[l] : top;
    const MHA_REAL base = top == (MHA_REAL)-INFINITY ? 0 : top;
    for (ptrdiff_t v = 0; v < vectors; v++) {
        const VECTOR p = MHA_NAME(v_probability)(MHA_NAME(v_load)(s + v * LANES), scale, MHA_NAME(v_set)(base));
        MHA_NAME(v_store)(s + v * LANES, p);
        total += p;
    }
    for (ptrdiff_t l = 0; l < LANES; l++)
        added += total[l];
    const VECTOR factor = MHA_NAME(v_exp)(MHA_NAME(v_set)(*maximum - base));
    *sum = *sum * factor[0] + added;
    *maximum = top;
    return factor[0];
}

/* exp of one value, the same bits as a lane of v_exp. */
MHA_FUNCTION MHA_REAL MHA_NAME(exp_one)(MHA_REAL x) { return MHA_NAME(v_exp)(MHA_NAME(v_set)(x))[0]; }

#undef VECTOR
#undef LANES
