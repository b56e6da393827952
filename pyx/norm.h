/* Layer norm of one row: sums run over explicit lanes. Template, included by lanes.h. */
#define VECTOR MHA_NAME(mha_vector)
#define LANES MHA_NAME(mha_lanes)

MHA_INLINE MHA_REAL MHA_NAME(lane_sum)(VECTOR x)
{
    MHA_REAL part[LANES];
    MHA_NAME(v_store)(part, x);
    for (ptrdiff_t half = LANES / 2; half > 0; half /= 2)
        for (ptrdiff_t l = 0; l < half; l++)
            part[l] += part[l + half];
    return part[0];
}

/* sum of x[i] * y[i] and sum of x[i]. */
MHA_FUNCTION void MHA_NAME(row_sums)(ptrdiff_t count, const MHA_REAL *x, const MHA_REAL *y, MHA_REAL *products,
                                     MHA_REAL *sum)
{
    VECTOR sums[4] = {{0}}, squares[4] = {{0}};
    MHA_REAL rest = 0, rest_product = 0;
    ptrdiff_t i = 0;
    for (; i + 4 * LANES <= count; i += 4 * LANES)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            sums[j] += MHA_NAME(v_load)(x + i + j * LANES);
            squares[j] += MHA_NAME(v_load)(x + i + j * LANES) * MHA_NAME(v_load)(y + i + j * LANES);
        }
    for (; i + LANES <= count; i += LANES) {
        sums[0] += MHA_NAME(v_load)(x + i);
        squares[0] += MHA_NAME(v_load)(x + i) * MHA_NAME(v_load)(y + i);
    }
    for (; i < count; i++) {
        rest += x[i];
        rest_product += x[i] * y[i];
    }
    *sum = MHA_NAME(lane_sum)((sums[0] + sums[1]) + (sums[2] + sums[3])) + rest;
    *products = MHA_NAME(lane_sum)((squares[0] + squares[1]) + (squares[2] + squares[3])) + rest_product;
}

/* x -> (x - mean) / sqrt(variance + epsilon), the biased variance; returns the factor 1 / sqrt(...). The sum of the
 * differences takes away what rounding left of the first mean: exact where |mean| is far above the spread. */
MHA_FUNCTION double MHA_NAME(normalise_row)(ptrdiff_t count, MHA_REAL *x, double epsilon)
{
    MHA_REAL sum, squares;
    MHA_NAME(row_sums)(count, x, x, &squares, &sum);
    const MHA_REAL mean = sum / (MHA_REAL)count;
    for (ptrdiff_t i = 0; i < count; i++)
        x[i] -= mean;
    MHA_NAME(row_sums)(count, x, x, &squares, &sum);
    const MHA_REAL rest = sum / (MHA_REAL)count;
    const double variance = ((double)squares - (double)sum * rest) / (double)count;
    const MHA_REAL factor = (MHA_REAL)(1 / sqrt((variance > 0 ? variance : variance * 0) + epsilon));
    for (ptrdiff_t i = 0; i < count; i++)
        x[i] = (x[i] - rest) * factor;
    return factor;
}

/* g -> factor * (g - mean(g) - x * mean(g * x)): through the norm whose result was x. */
MHA_FUNCTION void MHA_NAME(normalise_row_gradient)(ptrdiff_t count, const MHA_REAL *x, MHA_REAL *g, double factor)
{
    MHA_REAL sum, products;
    MHA_NAME(row_sums)(count, g, x, &products, &sum);
    const MHA_REAL mean = sum / (MHA_REAL)count, slope = products / (MHA_REAL)count;
    for (ptrdiff_t i = 0; i < count; i++)
        g[i] = (MHA_REAL)factor * (g[i] - mean - x[i] * slope);
}

#undef VECTOR
#undef LANES
