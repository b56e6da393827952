/* Between memory, in whatever type and strides the user keeps it, and panels of the computing type.
 * Template, included by lanes.h.
 */
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
            MHA_NAME(load_strided)(kind, base, start, 1, count, out, 1);               \
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
#define STORE(kind)                                                                                \
    case kind:                                                                                     \
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
