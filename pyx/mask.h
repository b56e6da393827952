/* What hides or shifts a score, applied to one row of a tile at a time. Biases come first, then whatever hides:
 * a hidden score is -inf whatever was added to it. Template, included by lanes.h.
 */
#define VECTOR MHA_NAME(mha_vector)
#define BITS MHA_NAME(mha_bits)
#define LANES MHA_NAME(mha_lanes)
#if MHA_IS_FLOAT
#define LOWEST -3.4028234663852886e38f
#else
#define LOWEST -1.7976931348623157e308
#endif

/* s *= scale */
MHA_FUNCTION void MHA_NAME(scale_scores)(ptrdiff_t vectors, MHA_REAL *s, MHA_REAL scale)
{
    for (ptrdiff_t v = 0; v < vectors; v++, s += LANES)
        MHA_NAME(v_store)(s, MHA_NAME(v_load)(s) * scale);
}

/* s -> cap * tanh(s / cap), with tanh itself kept in `slope` where the backward asks for it. */
MHA_FUNCTION void MHA_NAME(softcap_scores)(ptrdiff_t vectors, MHA_REAL *s, MHA_REAL cap, MHA_REAL *slope)
{
    for (ptrdiff_t v = 0; v < vectors; v++, s += LANES) {
        const VECTOR t = MHA_NAME(v_tanh)(MHA_NAME(v_load)(s) / cap);
        MHA_NAME(v_store)(s, t * cap);
        if (slope)
            MHA_NAME(v_store)(slope + v * LANES, t);
    }
}

/* ds *= 1 - slope ** 2, and exactly 0 where ds is 0 */
MHA_FUNCTION void MHA_NAME(softcap_gradient)(ptrdiff_t vectors, MHA_REAL *ds, const MHA_REAL *slope)
{
    for (ptrdiff_t v = 0; v < vectors; v++, ds += LANES, slope += LANES) {
        const VECTOR t = MHA_NAME(v_load)(slope), g = MHA_NAME(v_load)(ds), zero = {0};
        MHA_NAME(v_store)(ds, MHA_NAME(v_select)(g == zero, zero, g * (1 - t * t)));
    }
}

/* s += bias, one value a lane or one for the row. Two finite minima add to a finite minimum: their row is uniform,
 * not empty. A bias of -inf hides, and what is hidden already stays so. */
MHA_FUNCTION void MHA_NAME(add_bias)(ptrdiff_t vectors, MHA_REAL *s, const MHA_REAL *bias, int one_for_the_row)
{
    const VECTOR lowest = MHA_NAME(v_set)(LOWEST), none = MHA_NAME(v_set)((MHA_REAL)-INFINITY);
    for (ptrdiff_t v = 0; v < vectors; v++, s += LANES) {
        const VECTOR b = one_for_the_row ? MHA_NAME(v_set)(*bias) : MHA_NAME(v_load)(bias + v * LANES);
        const VECTOR before = MHA_NAME(v_load)(s);
        const BITS hidden = (BITS)(b == none) | (BITS)(before == none);
        MHA_NAME(v_store)(s, MHA_NAME(v_select)(hidden, none, MHA_NAME(v_max)(lowest, before + b)));
    }
}

/* Hides the lanes whose flag equals `hides`. */
MHA_FUNCTION void MHA_NAME(hide_flagged)(ptrdiff_t vectors, MHA_REAL *s, const MHA_REAL *flag, MHA_REAL hides)
{
    const VECTOR none = MHA_NAME(v_set)((MHA_REAL)-INFINITY);
    for (ptrdiff_t v = 0; v < vectors; v++, s += LANES, flag += LANES)
        MHA_NAME(v_store)(s,
                          MHA_NAME(v_select)(MHA_NAME(v_load)(flag) == hides - (VECTOR){0}, none, MHA_NAME(v_load)(s)));
}

/* Hides key `j` from the lanes that do not see it; lanes are queries, each sees low <= j < high. */
MHA_FUNCTION void MHA_NAME(hide_key)(ptrdiff_t vectors, MHA_REAL *s, MHA_REAL j, const MHA_REAL *low,
                                     const MHA_REAL *high)
{
    const VECTOR none = MHA_NAME(v_set)((MHA_REAL)-INFINITY), key = MHA_NAME(v_set)(j);
    for (ptrdiff_t v = 0; v < vectors; v++, s += LANES) {
        const BITS out =
            (BITS)(key < MHA_NAME(v_load)(low + v * LANES)) | (BITS)(key >= MHA_NAME(v_load)(high + v * LANES));
        MHA_NAME(v_store)(s, MHA_NAME(v_select)(out, none, MHA_NAME(v_load)(s)));
    }
}

/* Hides the lanes before `low` and from `high` on; lanes are keys. */
MHA_FUNCTION void MHA_NAME(hide_lanes)(ptrdiff_t width, MHA_REAL *s, ptrdiff_t low, ptrdiff_t high)
{
    for (ptrdiff_t j = 0; j < low && j < width; j++)
        s[j] = (MHA_REAL)-INFINITY;
    for (ptrdiff_t j = high < 0 ? 0 : high; j < width; j++)
        s[j] = (MHA_REAL)-INFINITY;
}

/* x = keep ? x * factor : 0, `half` one 16-bit draw a lane. */
MHA_FUNCTION void MHA_NAME(drop_lanes)(ptrdiff_t width, MHA_REAL *x, const uint32_t *word, int shift,
                                       uint32_t threshold, MHA_REAL factor)
{
    for (ptrdiff_t q = 0; q < width; q++)
        x[q] = ((word[q] >> shift) & 0xffff) >= threshold ? x[q] * factor : 0;
}

/* factor[lane] = 0 for a dropped key, `kept` for the others; lanes are the keys from `key` on, and the words are those of
 * mha_philox_rows for one group of 8 keys after the other, `stride` apart. */
MHA_FUNCTION void MHA_NAME(drop_factors)(ptrdiff_t count, MHA_REAL *factor, int64_t key, const uint32_t *words,
                                         ptrdiff_t stride, uint32_t threshold, MHA_REAL kept)
{
    for (ptrdiff_t t = 0; t < count; t++) {
        const int64_t group = ((key + t) >> 3) - (key >> 3), word = ((key + t) & 7) >> 1;
        const uint32_t half = words[(group * 4 + word) * stride] >> (16 * ((key + t) & 1)) & 0xffff;
        factor[t] = half >= threshold ? kept : 0;
    }
}

/* out = x * y */
MHA_FUNCTION void MHA_NAME(multiply)(ptrdiff_t count, MHA_REAL *out, const MHA_REAL *x, const MHA_REAL *y)
{
    for (ptrdiff_t i = 0; i < count; i++)
        out[i] = x[i] * y[i];
}

#undef VECTOR
#undef BITS
#undef LANES
#undef LOWEST
