// Which scores of a tile are visible, and what is added to them. Rows are queries, columns are keys.
//
// Three levels of work, compiled in: everything is seen; ranges of keys (causal, window, lengths); anything (masks read
// from memory, softcap). Masks are read where the user keeps them, broadcast axes with stride 0.
#pragma once
#include "philox.cuh"
#include "storage.cuh"

enum Masks { NOTHING_HIDDEN, RANGES, ANYTHING };
constexpr int MASKS = MHA_MASKS;

// The lowest finite value: what two finite biases add up to stays visible.
__device__ __forceinline__ float lowest(float) { return -3.4028234663852886e38f; }
__device__ __forceinline__ double lowest(double) { return -1.7976931348623157e308; }

// The keys that are not appended.
__device__ __forceinline__ int own_keys(const AttentionParams &p)
{
    return (int)(MASKS == NOTHING_HIDDEN ? p.keys : p.keys - p.extra);
}

// The range of keys that query i of sample n sees, appended keys apart; high = -1 for an empty row.
__device__ __forceinline__ void visible_keys(const AttentionParams &p, int64 n, int64 i, int &low, int &high)
{
    int64 lo = 0, hi = own_keys(p);
    if (MASKS != NOTHING_HIDDEN) {
        const int64 position = i + p.position + (p.offset ? p.offset[n] : 0);
        if (p.left >= 0 && position - p.left > lo)
            lo = position - p.left;
        if (p.right >= 0 && position + p.right + 1 < hi)
            hi = position + p.right + 1;
        if (p.row_low) {
            lo = max(lo, p.row_low[i]);
            hi = min(hi, p.row_high[i]);
        }
        if (p.key_lengths)
            hi = min(hi, p.key_lengths[n]);
        if (hi < lo)
            lo = hi = max((int64)0, min(lo, hi));
        if (p.query_lengths && i >= p.query_lengths[n]) {
            lo = 0;
            hi = -1;
        }
    }
    low = (int)lo;
    high = (int)hi;
}

// Whether sample n has key j at all: neither padding nor its length hides it. Others are never read.
__device__ __forceinline__ bool key_exists(const AttentionParams &p, int64 n, int64 j)
{
    const int64 own = own_keys(p);
    if (MASKS == NOTHING_HIDDEN || j >= own)
        return true;
    if (p.key_lengths && j >= p.key_lengths[n])
        return false;
    return MASKS != ANYTHING || !p.key_keep || p.key_keep[n * own + j];
}

// The queries that the ROWS rows of a block stand for: rows first .. first + rows of the queries of all query heads that
// share a key head, head by head; spare rows repeat the last one and are never stored. In shared memory.
template <int ROWS> struct Panel {
    int query[ROWS];
    int head[ROWS];
    int low[ROWS]; // each sees low <= key < high; high = -1: a row past its sample's length sees nothing
    int high[ROWS];
    int start; // keys seen by any row
    int stop;
    int all_start; // keys seen by every row
    int all_stop;
};

template <int ROWS, int THREADS>
__device__ __forceinline__ void fill_panel(const AttentionParams &p, Panel<ROWS> &panel, int64 n, int kv_head,
                                           int64 first, int rows)
{
    const int group = (int)(p.heads / p.kv_heads);
    __syncthreads();
    if (threadIdx.x == 0) {
        panel.start = panel.all_stop = (int)p.keys;
        panel.stop = panel.all_start = 0;
    }
    __syncthreads();
    for (int r = threadIdx.x; r < ROWS; r += THREADS) {
        const int64 row = first + min(r, rows - 1);
        const int head = (int)(row / p.queries), query = (int)(row - head * p.queries);
        int low, high;
        visible_keys(p, n, query, low, high);
        panel.query[r] = query;
        panel.head[r] = kv_head * group + head;
        panel.low[r] = low;
        panel.high[r] = high;
        if (low < high) {
            atomicMin(&panel.start, low);
            atomicMax(&panel.stop, high);
        }
        atomicMax(&panel.all_start, low);
        atomicMin(&panel.all_stop, high);
    }
    __syncthreads();
}

// The size of the tile that begins with key j; the appended keys have tiles of their own.
template <int KEYS> __device__ __forceinline__ int block_keys(const AttentionParams &p, int j)
{
    return min(KEYS, (j < own_keys(p) ? own_keys(p) : (int)p.keys) - j);
}

// The first key of the tile at or after key j that holds a key some row may see; -1: none left. Tiles begin at multiples
// of KEYS, and those that padding hides are passed over. Every thread of the block must call it.
template <int ROWS, int KEYS, int THREADS>
__device__ __forceinline__ int next_block(const AttentionParams &p, const Panel<ROWS> &panel, int64 n, int j)
{
    const int own = own_keys(p);
    if (j < own) {
        if (MASKS != NOTHING_HIDDEN)
            j = max(j, panel.start / KEYS * KEYS);
        const int stop = MASKS != NOTHING_HIDDEN ? min(panel.stop, own) : own;
        for (; j < stop; j += KEYS) {
            if (MASKS != ANYTHING || !p.key_keep)
                return j;
            bool any = false;
            for (int t = threadIdx.x; t < KEYS && j + t < own; t += THREADS)
                any |= p.key_keep[n * own + j + t] != 0;
            if (__syncthreads_or(any))
                return j;
        }
        j = own;
    }
    return j < p.keys ? j : -1;
}

// Whether all rows see all of the keys j .. j + KEYS, so that nothing needs masking.
template <int ROWS, int KEYS>
__device__ __forceinline__ bool all_visible(const AttentionParams &p, const Panel<ROWS> &panel, int j, int count)
{
    if (MASKS == NOTHING_HIDDEN)
        return count == KEYS;
    return MASKS == RANGES && count == KEYS && j < own_keys(p) && j >= panel.all_start && j + count <= panel.all_stop;
}

// A score of query i of head h against key j, from the product: scale, softcap, biases, boolean masks. `slope` receives
// tanh of a capped score.
__device__ __forceinline__ Real biased_score(const AttentionParams &p, int64 n, int h, int i, int j, Real s,
                                             Real &slope)
{
    const Real none = -(Real)infinity();
    s *= (Real)(p.score_scale);
    if (p.softcap != 0) {
        slope = (Real)tanh(s / (Real)p.softcap);
        s = slope * (Real)p.softcap;
    }
    const int own = own_keys(p);
    if (j >= own)
        return s;
    if (p.key_bias) {
        const Real b = ((const Real *)p.key_bias)[n * own + j];
        s = b == none || s == none ? none : s + b < lowest(s) ? lowest(s) : s + b;
    }
    if (p.pair_bias.data) {
        const Real b =
            load_one(p.pair_bias.storage, p.pair_bias.data, element(p.pair_bias, n, h, i) + j * p.pair_bias.column);
        s = b == none || s == none ? none : s + b < lowest(s) ? lowest(s) : s + b;
    }
    if (p.pair_keep.data) {
        const unsigned char flag =
            ((const unsigned char *)p.pair_keep.data)[element(p.pair_keep, n, h, i) + j * p.pair_keep.column];
        s = (flag != 0) == (p.pair_hides != 0) ? none : s;
    }
    return s;
}

// Scores s of the warp's rows, from first_row of the panel on, against keys j .. j + count: what is hidden becomes -inf,
// and with ANYTHING the scale, softcap and biases are applied. Returns whether a key that the sample has may be hidden
// from some of the block's rows.
template <int ROWS, int M, int N>
__device__ __forceinline__ bool mask_scores(const AttentionParams &p, const Panel<ROWS> &panel, int64 n, int first_row,
                                            int j, int count, Real (&s)[M][N][4], Real (&slope)[M][N][4])
{
    const Real none = -(Real)infinity();
    const int own = own_keys(p);
    if (all_visible<ROWS, 8 * N>(p, panel, j, count))
        return false;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int row = first_row + 16 * m + 8 * h + (lane_index() >> 2);
            const bool appended = MASKS != NOTHING_HIDDEN && j >= own;
            int low = 0, high = count;
            if (MASKS != NOTHING_HIDDEN) {
                low = appended ? 0 : panel.low[row] - j;
                high = appended ? (panel.high[row] < 0 ? 0 : count) : min(count, panel.high[row] - j);
            }
            const int head = MASKS == ANYTHING ? panel.head[row] : 0, query = MASKS == ANYTHING ? panel.query[row] : 0;
#pragma unroll
            for (int c = 0; c < N; c++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const int column = 8 * c + 2 * (lane_index() & 3) + e;
                    Real &x = s[m][c][2 * h + e];
                    const bool seen = column >= low && column < high;
                    if (MASKS == ANYTHING && seen) {
                        x = biased_score(p, n, head, query, j + column, x, slope[m][c][2 * h + e]);
                        if (!key_exists(p, n, j + column))
                            x = none;
                    }
                    x = seen ? x : none;
                }
        }
    if (MASKS == NOTHING_HIDDEN)
        return false;
    if (MASKS == ANYTHING && j < own && (p.key_bias || p.pair_bias.data || p.pair_keep.data))
        return true;
    return j < own ? j < panel.all_start || j + count > panel.all_stop : p.query_lengths != 0;
}

// Which draws of dropout stay: bit k & 7 of byte k >> 3 of a row, k counting keys from the group of eight of key j on.
// `draws` is shared memory of this warp, [rows][bytes].
template <class Row>
__device__ __forceinline__ void fill_draws(const AttentionParams &p, int64 n, int rows, int bytes, int64 j,
                                           unsigned char *draws, Row row_of)
{
    __syncwarp();
    for (int i = lane_index(); i < rows * bytes; i += 32) {
        const int r = i / bytes;
        int head, query;
        row_of(r, head, query);
        uint32 words[4];
        philox((uint32)((j + p.key_start >> 3) + i - r * bytes), (uint32)(query + p.query_start),
               (uint32)((n + p.batch_start) * p.total_heads + head + p.head_start), (uint32)p.dropout_offset,
               (uint32)p.seed, (uint32)(p.seed >> 32), words);
        draws[i] = (unsigned char)keep_bits(words, (uint32)p.threshold);
    }
    __syncwarp();
}

// Dropout of x, the warp's rows from first_row of the panel on against keys from j on.
template <int ROWS, int M, int N>
__device__ __forceinline__ void drop_scores(const AttentionParams &p, const Panel<ROWS> &panel, int64 n, int first_row,
                                            int j, Real (&x)[M][N][4], unsigned char *draws)
{
    const int skip = (int)(j + p.key_start & 7);
    fill_draws(p, n, 16 * M, N + 1, j, draws, [&](int r, int &head, int &query) {
        head = panel.head[first_row + r];
        query = panel.query[first_row + r];
    });
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int c = 0; c < N; c++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int r = 16 * m + 8 * (i >> 1) + (lane_index() >> 2);
                const int k = skip + 8 * c + 2 * (lane_index() & 3) + (i & 1);
                x[m][c][i] = draws[r * (N + 1) + (k >> 3)] >> (k & 7) & 1 ? x[m][c][i] * (Real)p.keep_scale : 0;
            }
}
