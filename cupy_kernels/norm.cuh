// Dropout and layer norm of one row by a team of TEAM threads: one warp, or the whole block. A row stays in global
// memory and is read again by every pass, from the cache, so that it may have any number of features.
#pragma once
#include "philox.cuh"
#include "storage.cuh"

constexpr int THREADS = MHA_THREADS, TEAM = MHA_TEAM, TEAMS = THREADS / TEAM, TEAM_WARPS = TEAM / 32;
static_assert(TEAM == 32 || TEAM == THREADS, "the sums of a row wait for the whole block");

constexpr int PIECE = 256; // features that a warp takes up at a time: one call of Philox for each lane

__device__ __forceinline__ int team_index() { return TEAM == 32 ? warp_index() : 0; }

// The sums of x over the threads of the team; every thread gets the same bits.
template <int COUNT> __device__ __forceinline__ void team_sum(Real (&x)[COUNT])
{
#pragma unroll
    for (int half = 16; half > 0; half /= 2)
#pragma unroll
        for (int k = 0; k < COUNT; k++)
            x[k] += __shfl_xor_sync(0xffffffff, x[k], half);
    if (TEAM_WARPS == 1)
        return;
    Real *parts = (Real *)shared_memory(); // [TEAM_WARPS][COUNT]
    __syncthreads();                       // everyone has read the last sums
    if (lane_index() == 0)
#pragma unroll
        for (int k = 0; k < COUNT; k++)
            parts[warp_index() * COUNT + k] = x[k];
    __syncthreads();
#pragma unroll
    for (int k = 0; k < COUNT; k++) {
        x[k] = 0;
        for (int warp = 0; warp < TEAM_WARPS; warp++)
            x[k] += parts[warp * COUNT + k];
    }
}

// Which of the eight features of a group stay, as bits: counter (e >> 3, i, n, offset).
__device__ __forceinline__ uint32 drop_row(const NormParams &p, int64 n, int64 i, uint32 group)
{
    uint32 words[4];
    philox(group, (uint32)(i + p.query_start), (uint32)(n + p.batch_start), (uint32)p.dropout_offset, (uint32)p.seed,
           (uint32)(p.seed >> 32), words);
    return keep_bits(words, (uint32)p.threshold);
}

// visit(feature, whether dropout keeps it) for this thread's share of a row: neighbouring lanes, neighbouring features.
template <class Visit>
__device__ __forceinline__ void visit_row(const NormParams &p, bool dropping, int64 n, int64 i, Visit visit)
{
    const int lane = lane_index();
    for (int64 first = PIECE * (warp_index() % TEAM_WARPS); first < p.features; first += PIECE * TEAM_WARPS) {
        const uint32 bits = dropping ? drop_row(p, n, i, (uint32)(first >> 3) + lane) : 0;
#pragma unroll
        for (int s = 0; s < PIECE / 32; s++) {
            const int64 e = first + 32 * s + lane;
            const bool kept = !dropping || __shfl_sync(0xffffffff, bits, 4 * s + (lane >> 3)) >> (lane & 7) & 1;
            if (e < p.features)
                visit(e, kept);
        }
    }
}

// What a norm takes away from a row and multiplies it with.
struct RowNorm {
    Real mean, rest, factor;
    __device__ __forceinline__ Real operator()(Real x) const { return (x - mean - rest) * factor; }
};

// Of the row whose values each(take) passes to take(x): the biased variance. The sum of the differences takes away what
// rounding left of the first mean: exact where |mean| is far above the spread.
template <class Each> __device__ __forceinline__ RowNorm normalise_row(int64 count, double epsilon, Each each)
{
    RowNorm norm;
    Real first[1] = {0}, sums[2] = {0, 0};
    each([&](Real x) { first[0] += x; });
    team_sum(first);
    norm.mean = first[0] / (Real)count;
    each([&](Real x) {
        sums[0] += x - norm.mean;
        sums[1] += (x - norm.mean) * (x - norm.mean);
    });
    team_sum(sums);
    norm.rest = sums[0] / (Real)count;
    const double variance = ((double)sums[1] - (double)sums[0] * norm.rest) / (double)count;
    norm.factor = (Real)(1 / sqrt((variance > 0 ? variance : variance * 0) + epsilon));
    return norm;
}

// Through the norm whose result was x: g -> factor * (g - mean - x * slope).
struct RowSlope {
    Real factor, mean, slope;
    __device__ __forceinline__ Real operator()(Real x, Real g) const { return factor * (g - mean - x * slope); }
};

// Of the row whose normalised values and gradients each(take) passes to take(x, g).
template <class Each> __device__ __forceinline__ RowSlope normalise_row_gradient(int64 count, Real factor, Each each)
{
    Real sums[2] = {0, 0};
    each([&](Real x, Real g) {
        sums[0] += g;
        sums[1] += g * x;
    });
    team_sum(sums);
    return {factor, sums[0] / (Real)count, sums[1] / (Real)count};
}
