// The tile of the backward whose rows are keys and whose columns are queries. Everything that belongs to a key is local to
// a block of threads, so the gradients of keys and values need no sums between blocks.
#pragma once
#include "online_softmax.cuh"

// What a tile of queries brings along, in shared memory.
template <int QUERIES> struct KeyPanel {
    int low[QUERIES]; // each sees low <= key < high; high = -1: an empty row, or none at all
    int high[QUERIES];
    Real base[QUERIES]; // probabilities are exp(score - shift) * scale; +inf: all are 0
    Real scale[QUERIES];
    Real delta[QUERIES];
    int all_start; // keys seen by every query
    int all_stop;
};

// How many panels of ROWS keys there are; the appended keys have their own.
__device__ __forceinline__ int key_panels(const AttentionParams &p, int rows)
{
    const int own = own_keys(p);
    return (own + rows - 1) / rows + ((int)p.keys - own + rows - 1) / rows;
}

// The keys first .. first + count of panel `index`.
__device__ __forceinline__ void key_range(const AttentionParams &p, int index, int rows, int &first, int &count)
{
    const int own = own_keys(p), panels = (own + rows - 1) / rows;
    first = index < panels ? index * rows : own + (index - panels) * rows;
    count = min(rows, (index < panels ? own : (int)p.keys) - first);
}

// Whether query i of sample n sees any of the keys first .. first + count.
__device__ __forceinline__ bool any_visible(const AttentionParams &p, int64 n, int64 i, int first, int count)
{
    int low, high;
    visible_keys(p, n, i, low, high);
    return high >= 0 && (first >= own_keys(p) || (low < first + count && high > first && low < high));
}

// Fills the panel for queries i .. i + QUERIES of a head; one warp does it.
template <int QUERIES>
__device__ __forceinline__ void fill_key_panel(const AttentionParams &p, const Exponent &exponent,
                                               KeyPanel<QUERIES> &panel, int64 n, int64 head, int64 i)
{
    int all_start = 0, all_stop = (int)p.keys;
    for (int c = lane_index(); c < QUERIES; c += 32) {
        int low = 0, high = -1;
        Real shift = -(Real)infinity(), scale = 0, delta = 0;
        if (i + c < p.queries) {
            const int64 row = (n * p.heads + head) * p.queries + i + c;
            visible_keys(p, n, i + c, low, high);
            shift = ((const Real *)p.shift)[row];
            scale = p.row_scale ? ((const Real *)p.row_scale)[row] : (Real)1;
            delta = ((const Real *)p.delta)[row];
        }
        panel.low[c] = low;
        panel.high[c] = high;
        panel.base[c] = shift == -(Real)infinity() ? (Real)infinity() : exponent.base(shift);
        panel.scale[c] = scale;
        panel.delta[c] = delta;
        all_start = max(all_start, low);
        all_stop = min(all_stop, high);
    }
#pragma unroll
    for (int other = 16; other > 0; other /= 2) {
        all_start = max(all_start, __shfl_xor_sync(0xffffffff, all_start, other));
        all_stop = min(all_stop, __shfl_xor_sync(0xffffffff, all_stop, other));
    }
    if (lane_index() == 0) {
        panel.all_start = all_start;
        panel.all_stop = all_stop;
    }
}

// Scores s of the warp's keys, from `key` on, against queries i .. of a head: what is hidden becomes -inf, and with
// ANYTHING the scale, softcap and biases are applied. Returns whether something that exists may be hidden in the tile of
// the keys first .. first + count.
template <int QUERIES, int M, int N>
__device__ __forceinline__ bool mask_query_scores(const AttentionParams &p, const KeyPanel<QUERIES> &panel, int64 n,
                                                  int head, int i, int first, int count, int key, Real (&s)[M][N][4],
                                                  Real (&slope)[M][N][4])
{
    const Real none = -(Real)infinity();
    const bool appended = MASKS != NOTHING_HIDDEN && first >= own_keys(p);
    const bool ranged = (appended ? 0 : panel.all_start) > first || panel.all_stop < (appended ? 0 : first + count);
    if (MASKS != ANYTHING && !ranged)
        return false;
#pragma unroll
    for (int c = 0; c < N; c++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const int query = 8 * c + 2 * (lane_index() & 3) + e;
            const int low = appended ? 0 : panel.low[query], high = panel.high[query];
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    const int j = key + 16 * m + 8 * h + (lane_index() >> 2);
                    Real &x = s[m][c][2 * h + e];
                    const bool seen = j < first + count && j >= low && (appended ? high >= 0 : j < high);
                    if (MASKS == ANYTHING && seen) {
                        x = biased_score(p, n, head, i + query, j, x, slope[m][c][2 * h + e]);
                        if (!key_exists(p, n, j))
                            x = none;
                    }
                    x = seen ? x : none;
                }
        }
    if (MASKS == ANYTHING && !appended && (p.key_keep || p.key_bias || p.pair_bias.data || p.pair_keep.data))
        return true;
    return ranged;
}

// Dropout of x, the warp's keys from `key` on against queries i .. of a head. `draws` is shared memory of this warp,
// [queries][bytes].
template <int M, int N>
__device__ __forceinline__ void drop_query_scores(const AttentionParams &p, int64 n, int head, int i, int key,
                                                  Real (&x)[M][N][4], const unsigned char *draws)
{
    constexpr int BYTES = 2 * M + 1;
    const int skip = (int)(key + p.key_start & 7);
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int c = 0; c < N; c++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int query = 8 * c + 2 * (lane_index() & 3) + (e & 1);
                const int k = skip + 16 * m + 8 * (e >> 1) + (lane_index() >> 2);
                x[m][c][e] = draws[query * BYTES + (k >> 3)] >> (k & 7) & 1 ? x[m][c][e] * (Real)p.keep_scale : 0;
            }
}
