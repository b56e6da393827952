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

/* exp(x) for x <= 80, within 1.1 ulp; below the smallest normal result exactly 0: subnormal probabilities would make the
 * products that follow six times slower. x = n ln 2 + r, with ln 2 in two parts so that r is as good as exact (Cody and
 * Waite); exp(r) is a polynomial through Chebyshev nodes, relative error 2.5e-9 (float32), 4e-18 (float64).
 */
MHA_INLINE VECTOR MHA_NAME(v_exp)(VECTOR x)
{
#if MHA_IS_FLOAT
    const MHA_REAL magic = 0x1.8p23f, smallest = -87.0f, high = 0.693359375f, low = -2.12194440e-4f;
    const int mantissa = 23, bias = 127;
    static const MHA_REAL c[] = {1.0000000000e+00f, 1.0000000377e+00f, 5.0000000471e-01f, 1.6666415515e-01f,
                                 4.1666352897e-02f, 8.3751263982e-03f, 1.3941108434e-03f};
#else
    const MHA_REAL magic = 0x1.8p52, smallest = -708.0, high = 6.93145751953125e-1, low = 1.42860682030941723212e-6;
    const int mantissa = 52, bias = 1023;
    static const MHA_REAL c[] = {1.0000000000000000000e+00, 1.0000000000000000000e+00, 5.0000000000000188738e-01,
                                 1.6666666666666674068e-01, 4.1666666666488341719e-02, 8.3333333333222986417e-03,
                                 1.3888888952273965686e-03, 1.9841269885404816875e-04, 2.4801485512385515621e-05,
                                 2.7557244445644922792e-06, 2.7632631484435140942e-07, 2.5109053856726478724e-08};
#endif
    enum { DEGREE = sizeof(c) / sizeof(c[0]) - 1 };
    const VECTOR shifted = x * (MHA_REAL)1.4426950408889634074 + magic; /* rounds; the low bits of the sum hold n */
    const VECTOR n = shifted - magic;
    const VECTOR r = (x - n * high) - n * low;
    VECTOR p = MHA_NAME(v_set)(c[DEGREE]);
#pragma GCC unroll 12
    for (int i = DEGREE - 1; i >= 0; i--)
        p = p * r + c[i];
    const VECTOR power = (VECTOR)(((BITS)shifted + bias) << mantissa);
    return (VECTOR)((BITS)(p * power) & ~(BITS)(x < smallest));
}

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
