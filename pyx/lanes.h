/* What every kernel header needs: the vector width of the instruction set this file is compiled for, and each
 * header of the house once per real type. The headers below are templates: they name types MHA_REAL and
 * functions MHA_NAME(function), which become function_f32 and function_f64.
 */
#ifndef MHA_LANES_H
#define MHA_LANES_H
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef __FINITE_MATH_ONLY__
#if __FINITE_MATH_ONLY__
#error "minus infinity is a mask value here: build without -ffinite-math-only and -ffast-math"
#endif
#endif

/* Rows of a register tile by its vectors, and the vectors of the tiles that plans make. AVX2 has sixteen registers: of a
 * tile of four vectors one operand would be loaded anew for each multiply-add. GFLOP/s with four / three / two: product
 * 128 x 768 x 768 169 / 204 / 192, attention 4 x 12 x 512 x 64 140 / 175 / 171; without a multiply-add, at the baseline,
 * all are alike.
 *
 * A tile of the widest vectors has the time to ask for the rows of the next one: 1 x 16 x 2048 x 128 1.10 times as fast,
 * the cube of 4096 1.03. With narrower vectors the requests take the place of loads: 1.09 and 0.98 with AVX2, 0.98 and
 * 0.91 at the baseline; float64 has 0.96 with them. */
#if defined(__AVX512F__)
#include <immintrin.h>
#define MHA_VECTOR_BYTES 64
#define MHA_FETCH_AHEAD 1
#define MHA_TILE_ROWS {0, 12, 12, 8, 6}
#define MHA_TILE_VECTORS 4
#elif defined(__AVX__)
#include <immintrin.h>
#define MHA_VECTOR_BYTES 32
#define MHA_TILE_ROWS {0, 8, 6, 4, 3}
#define MHA_TILE_VECTORS 3
#elif defined(__aarch64__)
#define MHA_VECTOR_BYTES 16
#define MHA_TILE_ROWS {0, 12, 12, 8, 6}
#define MHA_TILE_VECTORS 4
#else
#define MHA_VECTOR_BYTES 16
#define MHA_TILE_ROWS {0, 8, 6, 4, 3}
#define MHA_TILE_VECTORS 4
#endif
#ifndef MHA_FETCH_AHEAD
#define MHA_FETCH_AHEAD 0
#endif
/* result[l] is the lane of a and b, in one row, that INDEX(l, step) names; EACH lists the lanes. */
#if defined(__clang__)
#define MHA_SHUFFLE(bits, a, b, EACH, INDEX, step) __builtin_shufflevector(a, b, EACH(INDEX, step))
#else
#define MHA_SHUFFLE(bits, a, b, EACH, INDEX, step) __builtin_shuffle(a, b, (bits){EACH(INDEX, step)})
#endif
#define MHA_EACH_2(F, h) F(0, h), F(1, h)
#define MHA_EACH_4(F, h) MHA_EACH_2(F, h), F(2, h), F(3, h)
#define MHA_EACH_8(F, h) MHA_EACH_4(F, h), F(4, h), F(5, h), F(6, h), F(7, h)
#define MHA_EACH_16(F, h) MHA_EACH_8(F, h), F(8, h), F(9, h), F(10, h), F(11, h), F(12, h), F(13, h), F(14, h), F(15, h)
#if defined(__AMX_TILE__) && defined(__AMX_BF16__)
#define MHA_AMX
#endif
#define MHA_INLINE static inline __attribute__((always_inline, unused))
#define MHA_FUNCTION static __attribute__((unused))

/* How a value lies in memory; the same numbers as mha.params.STORAGE. */
enum { MHA_FLOAT32, MHA_FLOAT64, MHA_FLOAT16, MHA_BFLOAT16, MHA_BOOL };

/* Where a row of `load_transposed` starts that is not there. */
#define MHA_NOWHERE INT64_MIN

#include "half.h"
#include "philox.h"

#define MHA_REAL float
#define MHA_BITS int32_t
#define MHA_IS_FLOAT 1
#define MHA_NAME(name) name##_f32
#include "vec.h"
#if defined(__AVX512F__)
/* A vector at a time; the same values as half.h's, and any NaN is a quiet one. */
MHA_INLINE mha_vector_f32 mha_lanes_from_float16(const uint16_t *p)
{
    return (mha_vector_f32)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}
MHA_INLINE void mha_lanes_to_float16(uint16_t *p, mha_vector_f32 value)
{
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__F16C__)
MHA_INLINE mha_vector_f32 mha_lanes_from_float16(const uint16_t *p)
{
    return (mha_vector_f32)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
}
MHA_INLINE void mha_lanes_to_float16(uint16_t *p, mha_vector_f32 value)
{
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT));
}
#endif
#include "storage.h"
#include "tile.h"
#include "dots.h"
#include "stream.h"
#include "mask.h"
#include "online_softmax.h"
#include "norm.h"
#undef MHA_REAL
#undef MHA_BITS
#undef MHA_IS_FLOAT
#undef MHA_NAME

#define MHA_REAL double
#define MHA_BITS int64_t
#define MHA_IS_FLOAT 0
#define MHA_NAME(name) name##_f64
#include "vec.h"
#include "storage.h"
#include "tile.h"
#include "dots.h"
#include "stream.h"
#include "mask.h"
#include "online_softmax.h"
#include "norm.h"
#undef MHA_REAL
#undef MHA_BITS
#undef MHA_IS_FLOAT
#undef MHA_NAME

#include "pairs.h"

/* One name for both real types, chosen by the type of a pointer argument. */
/* clang-format off */
#define MHA_PICK(function, pointer)                                                                            \
    _Generic((pointer), float *: function##_f32, const float *: function##_f32, double *: function##_f64,       \
             const double *: function##_f64)
/* clang-format on */
#define tile_product(rows, vectors, k, a, ...) MHA_PICK(tile_product, a)(rows, vectors, k, a, __VA_ARGS__)
#define tile_product_hiding(rows, vectors, k, a, ...) MHA_PICK(tile_product_hiding, a)(rows, vectors, k, a, __VA_ARGS__)
#define softmax_absorb(keys, vectors, s, ...) MHA_PICK(softmax_absorb, s)(keys, vectors, s, __VA_ARGS__)
#define scale_lanes(rows, vectors, x, factor) MHA_PICK(scale_lanes, x)(rows, vectors, x, factor)
#define softmax_replay(keys, vectors, s, ...) MHA_PICK(softmax_replay, s)(keys, vectors, s, __VA_ARGS__)
#define softmax_replay_row(vectors, s, ...) MHA_PICK(softmax_replay_row, s)(vectors, s, __VA_ARGS__)
#define softmax_gradient(rows, vectors, p, ...) MHA_PICK(softmax_gradient, p)(rows, vectors, p, __VA_ARGS__)
#define scale_scores(vectors, s, scale) MHA_PICK(scale_scores, s)(vectors, s, scale)
#define softcap_scores(vectors, s, cap, slope) MHA_PICK(softcap_scores, s)(vectors, s, cap, slope)
#define softcap_gradient(vectors, ds, slope) MHA_PICK(softcap_gradient, ds)(vectors, ds, slope)
#define add_bias(vectors, s, bias, one_for_the_row) MHA_PICK(add_bias, s)(vectors, s, bias, one_for_the_row)
#define hide_flagged(vectors, s, flag, hides) MHA_PICK(hide_flagged, s)(vectors, s, flag, hides)
#define hide_key(vectors, s, j, low, high) MHA_PICK(hide_key, s)(vectors, s, j, low, high)
#define hide_lanes(width, s, low, high) MHA_PICK(hide_lanes, s)(width, s, low, high)
#define drop_lanes(width, x, ...) MHA_PICK(drop_lanes, x)(width, x, __VA_ARGS__)
#define softmax_absorb_row(vectors, s, ...) MHA_PICK(softmax_absorb_row, s)(vectors, s, __VA_ARGS__)
#define tile_dots(count, columns, key, ...) MHA_PICK(tile_dots, key)(count, columns, key, __VA_ARGS__)
#define tile_values(vectors, count, value, ...) MHA_PICK(tile_values, value)(vectors, count, value, __VA_ARGS__)
#define tile_lane_dots(columns, vectors, x, y, out) MHA_PICK(tile_lane_dots, x)(columns, vectors, x, y, out)
#define drop_factors(count, factor, ...) MHA_PICK(drop_factors, factor)(count, factor, __VA_ARGS__)
#define multiply(count, out, x, y) MHA_PICK(multiply, out)(count, out, x, y)
#define load_vector(storage, base, start, stride, count, out, out_stride) \
    MHA_PICK(load_vector, out)(storage, base, start, stride, count, out, out_stride)
#define load_transposed(storage, base, starts, stride, rows, columns, out, width) \
    MHA_PICK(load_transposed, out)(storage, base, starts, stride, rows, columns, out, width)
#define store_transposed(storage, base, starts, stride, rows, columns, value, ...) \
    MHA_PICK(store_transposed, value)(storage, base, starts, stride, rows, columns, value, __VA_ARGS__)
#define store_vector(storage, base, start, stride, count, value, ...) \
    MHA_PICK(store_vector, value)(storage, base, start, stride, count, value, __VA_ARGS__)
#define normalise_row(count, x, epsilon) MHA_PICK(normalise_row, x)(count, x, epsilon)
#define normalise_row_gradient(count, x, g, factor) MHA_PICK(normalise_row_gradient, x)(count, x, g, factor)
#define all_finite(x, ...) MHA_PICK(all_finite, x)(x, __VA_ARGS__)

#endif
