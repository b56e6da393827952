/* Layer norm of one row: sums run over explicit lanes, the mean is taken twice. Template, included by lanes.h. */
#define VECTOR MHA_NAME(mha_vector)
#define LANES MHA_NAME(mha_lanes)

/* sum of x[i] * y[i]; y NULL is 1. */
MHA_FUNCTION MHA_REAL MHA_NAME(row_sum)(ptrdiff_t count, const MHA_REAL *x, const MHA_REAL *y)
{
    VECTOR sum = {0};
    MHA_REAL rest = 0, part[LANES];
    ptrdiff_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        VECTOR term = MHA_NAME(v_load)(x + i);
        if (y)
            term *= MHA_NAME(v_load)(y + i);
        sum += term;
    }
    for (; i < count; i++)
        rest += y ? x[i] * y[i] : x[i];
    MHA_NAME(v_store)(part, sum);
    for (ptrdiff_t half = LANES / 2; half > 0; half /= 2)
        for (ptrdiff_t l = 0; l < half; l++)
            part[l] += part[l + half];
    return part[0] + rest;
}

/* x -> (x - mean) / sqrt(variance + epsilon), the biased variance; returns the factor 1 / sqrt(...). The second mean,
 * that of the differences, takes away what rounding left of the first: exact where |mean| is far above the spread. */
MHA_FUNCTION double MHA_NAME(normalise_row)(ptrdiff_t count, MHA_REAL *x, double epsilon)
{
    for (int pass = 0; pass < 2; pass++) {
        const MHA_REAL mean = MHA_NAME(row_sum)(count, x, 0) / (MHA_REAL)count;
        for (ptrdiff_t i = 0; i < count; i++)
            x[i] -= mean;
    }
    const MHA_REAL variance = MHA_NAME(row_sum)(count, x, x) / (MHA_REAL)count;
    const MHA_REAL factor = (MHA_REAL)(1 / sqrt((double)variance + epsilon));
    for (ptrdiff_t i = 0; i < count; i++)
        x[i] *= factor;
    return factor;
}

/* g -> factor * (g - mean(g) - x * mean(g * x)): through the norm whose result was x. */
MHA_FUNCTION void MHA_NAME(normalise_row_gradient)(ptrdiff_t count, const MHA_REAL *x, MHA_REAL *g, double factor)
{
    const MHA_REAL mean = MHA_NAME(row_sum)(count, g, 0) / (MHA_REAL)count;
    const MHA_REAL slope = MHA_NAME(row_sum)(count, g, x) / (MHA_REAL)count;
    for (ptrdiff_t i = 0; i < count; i++)
        g[i] = (MHA_REAL)factor * (g[i] - mean - x[i] * slope);
}

#undef VECTOR
#undef LANES
