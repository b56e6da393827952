// The softmax of a row, taken one tile of keys at a time (Milakov and Gimelshein, "Online normalizer calculation for
// softmax", 2018). A row lies in the four lanes of a quad.
#pragma once
#include "mask.cuh"

// Narrow types keep the scale out of the scores: it goes into the exponent's own multiplication.
constexpr bool FOLDED = NARROW && MASKS != ANYTHING;

__device__ __forceinline__ float exponential(float x) { return NARROW ? exp2_fast(x * 1.4426950408889634f) : expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }

// What the exponents of a row are taken from: score(s) is the natural score of a product, weight(s, shift) is
// exp(score(s) - shift), 0 for what is hidden even in a row without a finite score.
struct Exponent {
    Real scale; // of the product
    Real both;  // times log2 e
    __device__ __forceinline__ explicit Exponent(const AttentionParams &p)
        : scale(MASKS == ANYTHING ? (Real)1 : (Real)p.score_scale), both((Real)(p.score_scale * 1.4426950408889634))
    {
    }
    __device__ __forceinline__ Real score(Real s) const { return MASKS == ANYTHING ? s : s * scale; }
    __device__ __forceinline__ Real base(Real shift) const
    {
        const Real known = shift == -(Real)infinity() ? (Real)0 : shift;
        return FOLDED ? known * (Real)1.4426950408889634 : known;
    }
    __device__ __forceinline__ Real weight(Real s, Real base) const
    {
        if (FOLDED)
            return exp2_fast(s * both - base);
        return exponential(score(s) - base);
    }
};

__device__ __forceinline__ Real quad_max(Real x)
{
    Real other = __shfl_xor_sync(0xffffffff, x, 1);
    x = other > x ? other : x;
    other = __shfl_xor_sync(0xffffffff, x, 2);
    return other > x ? other : x;
}

__device__ __forceinline__ Real quad_sum(Real x)
{
    x += __shfl_xor_sync(0xffffffff, x, 1);
    return x + __shfl_xor_sync(0xffffffff, x, 2);
}

// Turns the products s into exp(score - maximum) and updates the running maximum, of natural scores, and sum of every
// row; `out` is multiplied by what that takes. A row that has seen no key keeps maximum -inf and sum 0. `sum` is this
// lane's share.
template <int M, int N, int C>
__device__ __forceinline__ void softmax_absorb(const Exponent &exponent, Real (&s)[M][N][4], Real (&maximum)[M][2],
                                               Real (&sum)[M][2], Real (&out)[M][C][4])
{
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            Real most = -(Real)infinity();
#pragma unroll
            for (int c = 0; c < N; c++)
#pragma unroll
                for (int e = 0; e < 2; e++)
                    most = s[m][c][2 * h + e] > most ? s[m][c][2 * h + e] : most;
            most = quad_max(most);
            most = most == -(Real)infinity() ? most : exponent.score(most); // the scale is positive, or applied
            const Real before = maximum[m][h];
            most = most > before ? most : before;
            const Real base = exponent.base(most);
            Real added = 0;
#pragma unroll
            for (int c = 0; c < N; c++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    Real &x = s[m][c][2 * h + e];
                    x = exponent.weight(x, base);
                    added += x;
                }
            const Real factor = before == -(Real)infinity() ? (Real)0 : exponential(before - most);
            sum[m][h] = sum[m][h] * factor + added;
            maximum[m][h] = most;
            if (__any_sync(0xffffffff, factor != 1)) {
#pragma unroll
                for (int j = 0; j < C; j++)
#pragma unroll
                    for (int e = 0; e < 2; e++)
                        out[m][j][2 * h + e] *= factor;
            }
        }
}

// s -> exp(score - shift) * scale, one shift and scale a row; what is hidden gives exactly 0 even in a row that another
// key has made NaN, and rows without a key carry shift = +inf.
__device__ __forceinline__ Real softmax_replay(const Exponent &exponent, Real s, Real base, Real scale)
{
    return s == -(Real)infinity() ? (Real)0 : exponent.weight(s, base) * scale;
}

// p * (dp - delta), and exactly 0 where p is 0: what a hidden pair holds never matters.
__device__ __forceinline__ Real softmax_gradient(Real p, Real dp, Real delta)
{
    return p == 0 ? (Real)0 : p * (dp - delta);
}

// Through c * tanh(x / c), t being the tanh, and exactly 0 where g is 0.
__device__ __forceinline__ Real softcap_gradient(Real g, Real t) { return g == 0 ? (Real)0 : g * (1 - t * t); }

// The row's log-sum-exp, and for the backward what it is made of.
__device__ __forceinline__ void store_statistics(const AttentionParams &p, int64 row, Real maximum, Real sum)
{
    ((Real *)p.lse)[row] = sum != 0 ? maximum + log(sum) : -(Real)infinity();
    if (p.shift) {
        ((Real *)p.shift)[row] = maximum;
        ((Real *)p.row_scale)[row] = sum != 0 ? 1 / sum : 0;
    }
}
