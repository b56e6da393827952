/* Vectors of one real type: max, select, exp and tanh. Template, included by lanes.h. */
#define VECTOR MHA_NAME(mha_vector)
#define BITS MHA_NAME(mha_bits)
#define LANES MHA_NAME(mha_lanes)
typedef MHA_REAL VECTOR __attribute__((vector_size(MHA_VECTOR_BYTES), aligned(sizeof(MHA_REAL)), may_alias));
typedef MHA_BITS BITS __attribute__((vector_size(MHA_VECTOR_BYTES), aligned(sizeof(MHA_REAL)), may_alias));
enum { LANES = MHA_VECTOR_BYTES / sizeof(MHA_REAL) };

MHA_INLINE VECTOR MHA_NAME(v_load)(const MHA_REAL *p) { return *(const VECTOR *)p; }
MHA_INLINE void MHA_NAME(v_store)(MHA_REAL *p, VECTOR v) { *(VECTOR *)p = v; }
MHA_INLINE VECTOR MHA_NAME(v_set)(MHA_REAL x) { return x - (VECTOR){0}; }

/* `when` is the result of a comparison: all bits of a lane set, or none. */
MHA_INLINE VECTOR MHA_NAME(v_select)(BITS when, VECTOR yes, VECTOR no)
{
    return (VECTOR)(((BITS)yes & when) | ((BITS)no & ~when));
}

/* x * scale, rounded: fused with a subtraction the largest score less itself would not be 0. */
MHA_INLINE VECTOR MHA_NAME(v_scaled)(VECTOR x, MHA_REAL scale)
{
    x *= scale;
#if defined(__x86_64__)
    __asm__("" : "+v"(x));
#elif defined(__aarch64__)
    __asm__("" : "+w"(x));
#else
    __asm__("" : "+m"(x));
#endif
    return x;
}

/* A NaN in `x` is passed over; one in `running` stays. */
MHA_INLINE VECTOR MHA_NAME(v_max)(VECTOR x, VECTOR running)
{
#if defined(__AVX512F__) && MHA_IS_FLOAT
    return (VECTOR)_mm512_max_ps((__m512)x, (__m512)running);
#elif defined(__AVX512F__)
    return (VECTOR)_mm512_max_pd((__m512d)x, (__m512d)running);
#elif defined(__AVX__) && MHA_IS_FLOAT
    return (VECTOR)_mm256_max_ps((__m256)x, (__m256)running);
#elif defined(__AVX__)
    return (VECTOR)_mm256_max_pd((__m256d)x, (__m256d)running);
#else
    return MHA_NAME(v_select)(x > running, x, running);
#endif
}

#if MHA_VECTOR_BYTES / (MHA_IS_FLOAT ? 4 : 8) == 16
#define EACH MHA_EACH_16
#elif MHA_VECTOR_BYTES / (MHA_IS_FLOAT ? 4 : 8) == 8
#define EACH MHA_EACH_8
#elif MHA_VECTOR_BYTES / (MHA_IS_FLOAT ? 4 : 8) == 4
#define EACH MHA_EACH_4
#else
#define EACH MHA_EACH_2
#endif
#define UPPER(l, h) (l & h ? LANES + l - h : l)
#define LOWER(l, h) (l & h ? LANES + l : l + h)
/* STEP(h) for h = 1, 2, 4 ... below LANES */
#if MHA_VECTOR_BYTES / (MHA_IS_FLOAT ? 4 : 8) == 16
#define STEPS(STEP) STEP(1) STEP(2) STEP(4) STEP(8)
#elif MHA_VECTOR_BYTES / (MHA_IS_FLOAT ? 4 : 8) == 8
#define STEPS(STEP) STEP(1) STEP(2) STEP(4)
#elif MHA_VECTOR_BYTES / (MHA_IS_FLOAT ? 4 : 8) == 4
#define STEPS(STEP) STEP(1) STEP(2)
#else
#define STEPS(STEP) STEP(1)
#endif

/* The LANES x LANES matrix whose rows these are becomes its transpose, in log2(LANES) exchanges of halves. */
MHA_INLINE void MHA_NAME(v_transpose)(VECTOR *r)
{
#define EXCHANGE(h)                                                        \
    _Pragma("GCC unroll 16") for (int i = 0; i < LANES; i++) if (!(i & h)) \
    {                                                                      \
        const VECTOR a = r[i], b = r[i + h];                               \
        r[i] = MHA_SHUFFLE(BITS, a, b, EACH, UPPER, h);                    \
        r[i + h] = MHA_SHUFFLE(BITS, a, b, EACH, LOWER, h);                \
    }
    STEPS(EXCHANGE)
#undef EXCHANGE
}

/* Lane l of the result is the sum of the lanes of r[l], always in the same order. */
MHA_INLINE VECTOR MHA_NAME(v_sums)(VECTOR *r)
{
#define FOLD(h)                                                            \
    _Pragma("GCC unroll 16") for (int i = 0; i < LANES; i += 2 * h) r[i] = \
        MHA_SHUFFLE(BITS, r[i], r[i + h], EACH, UPPER, h) + MHA_SHUFFLE(BITS, r[i], r[i + h], EACH, LOWER, h);
    STEPS(FOLD)
#undef FOLD
    return r[0];
}
#undef EACH
#undef UPPER
#undef LOWER
#undef STEPS

/* Entries of a table of 2**(i / entries) which one instruction looks up, each lane its own. */
#if defined(__AVX512F__) && MHA_IS_FLOAT
#define ENTRIES 16
#define LOOK_UP(table, index) ((BITS)_mm512_permutexvar_epi32((__m512i)(index), (__m512i)(table)))
#elif defined(__AVX512F__)
#define ENTRIES 8
#define LOOK_UP(table, index) ((BITS)_mm512_permutexvar_epi64((__m512i)(index), (__m512i)(table)))
#elif defined(__AVX2__) && MHA_IS_FLOAT
#define ENTRIES 8
#define LOOK_UP(table, index) ((BITS)_mm256_permutevar8x32_epi32((__m256i)(table), (__m256i)(index)))
#else
#define ENTRIES 1
#define LOOK_UP(table, index) (table)
#endif

/* exp(x) for x <= 80, within 1.3 ulp; below the smallest normal result exactly 0: subnormal probabilities would make the
 * products that follow six times slower. x = n ln 2 / ENTRIES + r, with ln 2 in two parts so that r is as good as exact
 * (Cody and Waite). 2**(n / ENTRIES) is an entry, whose exponent n's upper bits are added to (Tang, "Table-driven
 * implementation of the exponential function", 1989); exp(r) = 1 + r c(r), a polynomial through Chebyshev nodes. The
 * relative error of that is at most 5.1e-9 (float32), 8.5e-18 (float64). A longer polynomial without a table takes 1.4
 * times as long with AVX-512.
 */
MHA_INLINE VECTOR MHA_NAME(v_exp)(VECTOR x)
{
    /* The bits of 2**(i / ENTRIES), less those that i itself will add below the exponent. */
#if MHA_IS_FLOAT
    const MHA_REAL magic = 0x1.8p23f, smallest = -87.0f, high = 0.693359375f, low = -2.12194440e-4f;
    const int mantissa = 23;
#if ENTRIES == 16
    const BITS table = {0x3f800000, 0x3f7daac3, 0x3f7b95c2, 0x3f79c3d3, 0x3f7837f0, 0x3f76f532, 0x3f75fed7, 0x3f75583f,
                        0x3f7504f3, 0x3f7508a4, 0x3f75672a, 0x3f76248c, 0x3f7744fd, 0x3f78ccdf, 0x3f7ac0c7, 0x3f7d257d};
    static const MHA_REAL c[] = {1.0000000000e+00f, 5.0001466243e-01f, 1.6666959914e-01f};
#elif ENTRIES == 8
    const BITS table = {0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7, 0x3f7504f3, 0x3f75672a, 0x3f7744fd, 0x3f7ac0c7};
    static const MHA_REAL c[] = {9.9999999633e-01f, 4.9999999939e-01f, 1.6668230702e-01f, 4.1669273368e-02f};
#else
    const MHA_BITS table = 0x3f800000;
    static const MHA_REAL c[] = {1.0000000108e+00f, 5.0000000135e-01f, 1.6666505260e-01f,
                                 4.1666465006e-02f, 8.3691484909e-03f, 1.3933641032e-03f};
#endif
#else
    const MHA_REAL magic = 0x1.8p52, smallest = -708.0, high = 6.93145751953125e-1, low = 1.42860682030941723212e-6;
    const int mantissa = 52;
#if ENTRIES == 8
    const BITS table = {0x3ff0000000000000, 0x3fef72b83c7d517b, 0x3fef06fe0a31b715, 0x3feebfdad5362a27,
                        0x3feea09e667f3bcd, 0x3feeace5422aa0db, 0x3feee89f995ad3ad, 0x3fef5818dcfba487};
    static const MHA_REAL c[] = {1.0000000000000000000e+00, 5.0000000000001798561e-01, 1.6666666666666871133e-01,
                                 4.1666666590213702337e-02, 8.3333333247759006773e-03, 1.3889703533632388483e-03,
                                 1.9842177577710580667e-04};
#else
    const MHA_BITS table = 0x3ff0000000000000;
    static const MHA_REAL c[] = {1.0000000000000000000e+00, 5.0000000000000055511e-01, 1.6666666666666671293e-01,
                                 4.1666666666573155819e-02, 8.3333333333259242137e-03, 1.3888888932487898371e-03,
                                 1.9841269875171056963e-04, 2.4801504343686295556e-05, 2.7557255145252546065e-06,
                                 2.7626359716607159440e-07, 2.5105284197701959985e-08};
#endif
#endif
    enum { DEGREE = sizeof(c) / sizeof(c[0]) - 1 };
    const int index_bits = ENTRIES == 16 ? 4 : ENTRIES == 8 ? 3 : 0;
    /* rounds; the low bits of the sum hold n */
    const VECTOR shifted = x * ((MHA_REAL)1.4426950408889634074 * ENTRIES) + magic;
    const VECTOR n = shifted - magic;
    const VECTOR r = (x - n * (high / ENTRIES)) - n * (low / ENTRIES);
    VECTOR p = MHA_NAME(v_set)(c[DEGREE]);
#pragma GCC unroll 12
    for (int i = DEGREE - 1; i >= 0; i--)
        p = p * r + c[i];
    const VECTOR power = (VECTOR)(LOOK_UP(table, shifted) + ((BITS)shifted << (mantissa - index_bits)));
    return (VECTOR)((BITS)(power + power * r * p) & ~(BITS)(x < smallest));
}
#undef ENTRIES
#undef LOOK_UP

/* tanh within 2 ulp; the rational form near 0 is from the Cephes library (Moshier). */
MHA_INLINE VECTOR MHA_NAME(v_tanh)(VECTOR x)
{
    const VECTOR zero = {0};
    const VECTOR size = MHA_NAME(v_select)(x < zero, -x, x);
    const VECTOR s = x * x;
    const VECTOR top = ((MHA_REAL)-9.64399179425052238628e-1 * s - (MHA_REAL)9.92877231001918586564e1) * s -
                       (MHA_REAL)1.61468768441708447952e3;
    const VECTOR bottom = ((s + (MHA_REAL)1.12811678491632931402e2) * s + (MHA_REAL)2.23548839060100448583e3) * s +
                          (MHA_REAL)4.84406305325125486048e3;
    const VECTOR near = x + x * s * top / bottom;
    const VECTOR limit = MHA_NAME(v_set)(20);
    const VECTOR capped = MHA_NAME(v_select)(size > limit, limit, size);
    const VECTOR far = 1 - 2 / (MHA_NAME(v_exp)(capped + capped) + 1);
    const VECTOR signed_far = MHA_NAME(v_select)(x < zero, -far, far);
    return MHA_NAME(v_select)(size < MHA_NAME(v_set)((MHA_REAL)0.625), near, signed_far);
}

#undef VECTOR
#undef BITS
#undef LANES
