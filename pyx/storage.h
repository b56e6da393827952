/* Between memory, in whatever type and strides the user keeps it, and panels of the computing type.
 * Template, included by lanes.h.
 */
#define VECTOR MHA_NAME(mha_vector)
#define LANES MHA_NAME(mha_lanes)

MHA_INLINE MHA_REAL MHA_NAME(load_one)(int storage, const void *base, ptrdiff_t index)
{
    switch (storage) {
    case MHA_FLOAT32:
        return (MHA_REAL)((const float *)base)[index];
    case MHA_FLOAT64:
        return (MHA_REAL)((const double *)base)[index];
    case MHA_FLOAT16:
        return (MHA_REAL)mha_from_float16(((const uint16_t *)base)[index]);
    case MHA_BFLOAT16:
        return (MHA_REAL)mha_from_bfloat16(((const uint16_t *)base)[index]);
    default:
        return (MHA_REAL)((const uint8_t *)base)[index];
    }
}

MHA_INLINE void MHA_NAME(store_one)(int storage, void *base, ptrdiff_t index, MHA_REAL value)
{
    switch (storage) {
    case MHA_FLOAT32:
        ((float *)base)[index] = (float)value;
        break;
    case MHA_FLOAT64:
        ((double *)base)[index] = (double)value;
        break;
    case MHA_FLOAT16:
        ((uint16_t *)base)[index] = mha_to_float16((float)value);
        break;
    default:
        ((uint16_t *)base)[index] = mha_to_bfloat16((float)value);
    }
}

/* LANES neighbours. */
MHA_INLINE VECTOR MHA_NAME(load_lanes)(int storage, const void *base, ptrdiff_t start)
{
    MHA_REAL x[LANES];
    if (storage == (MHA_IS_FLOAT ? MHA_FLOAT32 : MHA_FLOAT64))
        return MHA_NAME(v_load)((const MHA_REAL *)base + start);
#if MHA_IS_FLOAT && defined(__F16C__)
    if (storage == MHA_FLOAT16)
        return mha_lanes_from_float16((const uint16_t *)base + start);
#endif
    for (int l = 0; l < LANES; l++)
        x[l] = MHA_NAME(load_one)(storage, base, start + l);
    return MHA_NAME(v_load)(x);
}

MHA_INLINE void MHA_NAME(store_lanes)(int storage, void *base, ptrdiff_t start, VECTOR value)
{
    if (storage == (MHA_IS_FLOAT ? MHA_FLOAT32 : MHA_FLOAT64))
        MHA_NAME(v_store)((MHA_REAL *)base + start, value);
#if MHA_IS_FLOAT && defined(__F16C__)
    else if (storage == MHA_FLOAT16)
        mha_lanes_to_float16((uint16_t *)base + start, value);
#endif
    else
        for (int l = 0; l < LANES; l++)
            MHA_NAME(store_one)(storage, base, start + l, value[l]);
}

MHA_INLINE void MHA_NAME(load_contiguous)(int storage, const void *base, ptrdiff_t start, ptrdiff_t count,
                                          MHA_REAL *out)
{
    ptrdiff_t i = 0;
    for (; i + LANES <= count; i += LANES)
        MHA_NAME(v_store)(out + i, MHA_NAME(load_lanes)(storage, base, start + i));
    for (; i < count; i++)
        out[i] = MHA_NAME(load_one)(storage, base, start + i);
}

MHA_INLINE void MHA_NAME(load_strided)(int storage, const void *base, ptrdiff_t start, ptrdiff_t stride,
                                       ptrdiff_t count, MHA_REAL *out, ptrdiff_t out_stride)
{
    for (ptrdiff_t i = 0; i < count; i++)
        out[i * out_stride] = MHA_NAME(load_one)(storage, base, start + i * stride);
}

/* out[i * out_stride] = base[start + i * stride] as MHA_REAL. The constant arguments let each loop vectorise. */
MHA_FUNCTION void MHA_NAME(load_vector)(int storage, const void *base, ptrdiff_t start, ptrdiff_t stride,
                                        ptrdiff_t count, MHA_REAL *out, ptrdiff_t out_stride)
{
#define LOAD(kind)                                                                     \
    case kind:                                                                         \
        if (stride == 1 && out_stride == 1)                                            \
            MHA_NAME(load_contiguous)(kind, base, start, count, out);                  \
        else                                                                           \
            MHA_NAME(load_strided)(kind, base, start, stride, count, out, out_stride); \
        break;
    switch (storage) {
        LOAD(MHA_FLOAT32)
        LOAD(MHA_FLOAT64)
        LOAD(MHA_FLOAT16)
        LOAD(MHA_BFLOAT16)
        LOAD(MHA_BOOL)
    }
#undef LOAD
}

/* base[start + i * stride] = value[i * value_stride] * factor, rounded to the stored type. */
MHA_FUNCTION void MHA_NAME(store_vector)(int storage, void *base, ptrdiff_t start, ptrdiff_t stride, ptrdiff_t count,
                                         const MHA_REAL *value, ptrdiff_t value_stride, MHA_REAL factor)
{
#define STORE(kind)                                                                                    \
    case kind:                                                                                         \
        if (stride == 1 && value_stride == 1) {                                                        \
            ptrdiff_t i = 0;                                                                           \
            for (; i + LANES <= count; i += LANES)                                                     \
                MHA_NAME(store_lanes)(kind, base, start + i, MHA_NAME(v_load)(value + i) * factor);    \
            for (; i < count; i++)                                                                     \
                MHA_NAME(store_one)(kind, base, start + i, value[i] * factor);                         \
        } else                                                                                         \
            for (ptrdiff_t i = 0; i < count; i++)                                                      \
                MHA_NAME(store_one)(kind, base, start + i * stride, value[i * value_stride] * factor); \
        break;
    switch (storage) {
        STORE(MHA_FLOAT32)
        STORE(MHA_FLOAT64)
        STORE(MHA_FLOAT16)
        STORE(MHA_BFLOAT16)
    }
#undef STORE
}

MHA_INLINE void MHA_NAME(load_transposed_as)(int storage, const void *base, const int64_t *starts, ptrdiff_t stride,
                                             ptrdiff_t rows, ptrdiff_t columns, MHA_REAL *out, ptrdiff_t width)
{
    for (ptrdiff_t q = 0; q < width; q += LANES) {
        const ptrdiff_t whole = stride == 1 ? columns / LANES * LANES : 0;
        for (ptrdiff_t d = 0; d < whole; d += LANES) {
            VECTOR row[LANES];
#pragma GCC unroll 16
            for (int l = 0; l < LANES; l++)
                row[l] = q + l < rows && starts[q + l] != MHA_NOWHERE
                             ? MHA_NAME(load_lanes)(storage, base, starts[q + l] + d)
                             : (VECTOR){0};
            MHA_NAME(v_transpose)(row);
#pragma GCC unroll 16
            for (int l = 0; l < LANES; l++)
                MHA_NAME(v_store)(out + (d + l) * width + q, row[l]);
        }
        for (ptrdiff_t l = q; l < q + LANES; l++)
            for (ptrdiff_t d = whole; d < columns; d++)
                out[d * width + l] = l < rows && starts[l] != MHA_NOWHERE
                                         ? MHA_NAME(load_one)(storage, base, starts[l] + d * stride)
                                         : 0;
    }
}

/* out[columns][width]: out[d][q] = base[starts[q] + d * stride] as MHA_REAL; 0 for lanes from `rows` on and where a row
 * starts at MHA_NOWHERE, which is never read. Rows of neighbours are transposed in registers: written one value at a
 * time they took a fifth of the attention of 128 queries. */
MHA_FUNCTION void MHA_NAME(load_transposed)(int storage, const void *base, const int64_t *starts, ptrdiff_t stride,
                                            ptrdiff_t rows, ptrdiff_t columns, MHA_REAL *out, ptrdiff_t width)
{
#define LOAD(kind)                                                                           \
    case kind:                                                                               \
        MHA_NAME(load_transposed_as)(kind, base, starts, stride, rows, columns, out, width); \
        break;
    switch (storage) {
        LOAD(MHA_FLOAT32)
        LOAD(MHA_FLOAT64)
        LOAD(MHA_FLOAT16)
        LOAD(MHA_BFLOAT16)
        LOAD(MHA_BOOL)
    }
#undef LOAD
}

MHA_INLINE void MHA_NAME(store_transposed_as)(int storage, void *base, const int64_t *starts, ptrdiff_t stride,
                                              ptrdiff_t rows, ptrdiff_t columns, const MHA_REAL *value, ptrdiff_t width,
                                              MHA_REAL factor)
{
    for (ptrdiff_t q = 0; q < rows; q += LANES) {
        const ptrdiff_t whole = stride == 1 ? columns / LANES * LANES : 0;
        const ptrdiff_t last = q + LANES < rows ? q + LANES : rows;
        for (ptrdiff_t d = 0; d < whole; d += LANES) {
            VECTOR row[LANES];
#pragma GCC unroll 16
            for (int l = 0; l < LANES; l++)
                row[l] = MHA_NAME(v_load)(value + (d + l) * width + q) * factor;
            MHA_NAME(v_transpose)(row);
#pragma GCC unroll 16
            for (int l = 0; l < LANES; l++)
                if (q + l < last)
                    MHA_NAME(store_lanes)(storage, base, starts[q + l] + d, row[l]);
        }
        for (ptrdiff_t l = q; l < last; l++)
            for (ptrdiff_t d = whole; d < columns; d++)
                MHA_NAME(store_one)(storage, base, starts[l] + d * stride, value[d * width + l] * factor);
    }
}

/* base[starts[q] + d * stride] = value[d][q] * factor, rounded to the stored type, for value[columns][width]. */
MHA_FUNCTION void MHA_NAME(store_transposed)(int storage, void *base, const int64_t *starts, ptrdiff_t stride,
                                             ptrdiff_t rows, ptrdiff_t columns, const MHA_REAL *value, ptrdiff_t width,
                                             MHA_REAL factor)
{
#define STORE(kind)                                                                                     \
    case kind:                                                                                          \
        MHA_NAME(store_transposed_as)(kind, base, starts, stride, rows, columns, value, width, factor); \
        break;
    switch (storage) {
        STORE(MHA_FLOAT32)
        STORE(MHA_FLOAT64)
        STORE(MHA_FLOAT16)
        STORE(MHA_BFLOAT16)
    }
#undef STORE
}

/* Whether every one of rows x columns values is finite: x - x is 0 for these and NaN for the others. */
MHA_FUNCTION int MHA_NAME(all_finite)(const MHA_REAL *x, ptrdiff_t rows, ptrdiff_t row, ptrdiff_t columns,
                                      ptrdiff_t column)
{
    for (ptrdiff_t i = 0; i < rows; i++) {
        const MHA_REAL *p = x + i * row;
        int bad = 0;
        if (column == 1)
            for (ptrdiff_t j = 0; j < columns; j++)
                bad |= !(p[j] - p[j] == 0);
        else
            for (ptrdiff_t j = 0; j < columns; j++)
                bad |= !(p[j * column] - p[j * column] == 0);
        if (bad)
            return 0;
    }
    return 1;
}

#undef VECTOR
#undef LANES
