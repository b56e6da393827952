// What needs the probabilities themselves, recomputed tile by tile. Five modes: the weights written per head; averaged
// over the heads in (N, L, S) memory; the gradient of an additive mask, summed over the axes that the mask broadcasts; the
// share that a gradient of the returned weights has in delta; and a correction for rows whose scores are so large that
// the log-sum-exp cannot hold the sum beside the maximum. A block of threads owns its part of the target and sums in a
// fixed order.
#include "query_rows.cuh"

enum Mode { WEIGHTS, AVERAGE, MASK_GRADIENT, DELTA, ROW_SCALE };
constexpr int MODE = MHA_MODE;
constexpr int WARPS = MHA_WARPS, THREADS = 32 * WARPS, M = MHA_ROW_TILES, ROWS = 16 * M * WARPS, KEYS = MHA_KEYS;
constexpr int D = MHA_HEAD_DIM, DV = MHA_V_HEAD_DIM;
constexpr bool ALIGNED = MHA_ALIGNED, DROPOUT = MHA_DROPOUT && MODE != ROW_SCALE, GRADIENT = MODE == MASK_GRADIENT;
constexpr int SHARED = (sizeof(Panel<ROWS>) + 15) / 16 * 16 + (ROWS + KEYS) * Tile<Stored, D>::ROW_BYTES +
                       (GRADIENT ? (ROWS + KEYS) * Tile<Stored, DV>::ROW_BYTES : 0) +
                       (GRADIENT ? WARPS * KEYS * (int)sizeof(Real) : 0) + (DROPOUT ? ROWS * (KEYS / 8 + 1) : 0);
static_assert(SHARED == MHA_SHARED, "the plan reckons with another amount of shared memory");

typedef Real Scores[M][KEYS / 8][4];

struct Shared {
    Panel<ROWS> *panel;
    Stored *query, *key, *grad_output, *value;
    Real *sums; // [WARPS][KEYS]
    unsigned char *draws;
    int first_row;
};

// Rows i .. i + rows of the queries of one head.
__device__ __forceinline__ void load_queries(const AttentionParams &p, const Shared &shared, int64 n, int head, int i,
                                             int rows)
{
    const int group = (int)(p.heads / p.kv_heads);
    const Panel<ROWS> &panel = *shared.panel;
    fill_panel<ROWS, THREADS>(p, *shared.panel, n, head / group, head % group * p.queries + i, rows);
    load_rows<ALIGNED, D, THREADS>(shared.query, ROWS, p.query, (int)p.head_dim, [&](int r) {
        return r < rows && panel.high[r] >= 0 ? element(p.query, n, head, i + r) : (int64)-1;
    });
    if (GRADIENT)
        load_rows<ALIGNED, DV, THREADS>(shared.grad_output, ROWS, p.grad_output, (int)p.v_head_dim, [&](int r) {
            return r < rows && panel.high[r] >= 0 ? element(p.grad_output, n, head, i + r) : (int64)-1;
        });
    copy_async_commit();
}

// x: the weights of the loaded rows and the tile of key j, after dropout, or the gradients of their scores.
__device__ __forceinline__ void weights_tile(const AttentionParams &p, const Shared &shared, const Exponent &exponent,
                                             const RowStatistics<M> &rows, int64 n, int head, int j, Scores &x)
{
    const int count = block_keys<KEYS>(p, j), kv_head = head / (int)(p.heads / p.kv_heads);
    const Panel<ROWS> &panel = *shared.panel;
    load_rows<ALIGNED, D, THREADS>(shared.key, KEYS, p.key, (int)p.head_dim, [&](int r) {
        return r < count && key_exists(p, n, j + r) ? element(p.key, n, kv_head, j + r) : (int64)-1;
    });
    if (GRADIENT)
        load_rows<ALIGNED, DV, THREADS>(shared.value, KEYS, p.value, (int)p.v_head_dim, [&](int r) {
            return r < count && key_exists(p, n, j + r) ? element(p.value, n, kv_head, j + r) : (int64)-1;
        });
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
    Scores weights, slope;
    clear(weights);
    tile_scores<D>(weights, shared.query + shared.first_row * Tile<Stored, D>::ROW, shared.key);
    mask_scores(p, panel, n, shared.first_row, j, count, weights, slope);
    replay_rows(exponent, rows, MODE != ROW_SCALE, weights);
    if (GRADIENT) {
        clear(x);
        tile_scores<DV>(x, shared.grad_output + shared.first_row * Tile<Stored, DV>::ROW, shared.value);
        if (MASKS == ANYTHING && p.grad_weights.data)
            add_grad_weights(p, panel, n, shared.first_row, j, count, x);
    } else {
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int c = 0; c < KEYS / 8; c++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    x[m][c][e] = weights[m][c][e];
    }
    if (DROPOUT)
        drop_scores(p, panel, n, shared.first_row, j, x, shared.draws);
    if (GRADIENT) // the mask is added behind the softcap: its slope has no part in this
        score_gradients(rows, weights, x);
    __syncthreads(); // the tile may be overwritten
}

// Where key j of the tile that begins `tile` tiles from the start lies; the appended keys have tiles of their own.
__device__ __forceinline__ int first_key(const AttentionParams &p, int tile)
{
    const int own = own_keys(p), tiles = (own + KEYS - 1) / KEYS;
    return tile < tiles ? tile * KEYS : own + (tile - tiles) * KEYS;
}

// Adds the columns of `sum` up: over the rows of a warp, then over the warps, always in the same order. Afterwards the
// first warp's first row holds the result.
__device__ __forceinline__ void sum_rows(const Shared &shared, Scores &sum)
{
    __syncthreads();
#pragma unroll
    for (int c = 0; c < KEYS / 8; c++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
            Real all = 0;
#pragma unroll
            for (int m = 0; m < M; m++)
                all += sum[m][c][e] + sum[m][c][2 + e];
#pragma unroll
            for (int other = 4; other < 32; other *= 2)
                all += __shfl_xor_sync(0xffffffff, all, other);
            if (lane_index() < 4)
                shared.sums[warp_index() * KEYS + 8 * c + 2 * lane_index() + e] = all;
        }
    __syncthreads();
#pragma unroll
    for (int c = 0; c < KEYS / 8; c++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
            Real all = 0;
            for (int warp = 0; warp < WARPS; warp++)
                all += shared.sums[warp * KEYS + 8 * c + 2 * (lane_index() & 3) + e];
            sum[0][c][e] = all;
        }
}

// A part of the target: some rows (all of them if they are summed over), one tile of keys.
__device__ __forceinline__ void target_tile(const AttentionParams &p, const Shared &shared)
{
    const Exponent exponent(p);
    const int tiles =
        ((int)p.target_keys == own_keys(p) ? 0 : ((int)p.extra + KEYS - 1) / KEYS) + (own_keys(p) + KEYS - 1) / KEYS;
    const int blocks = (int)((p.target_rows + ROWS - 1) / ROWS);
    int64 item = blockIdx.x;
    const int j = first_key(p, (int)(item % tiles));
    item /= tiles;
    const int first = (int)(item % blocks) * ROWS;
    item /= blocks;
    const int target_head = (int)(item % p.target_heads), target_sample = (int)(item / p.target_heads);
    const bool all_rows = p.target_rows != p.queries, all_heads = p.target_heads != p.heads;
    const bool all_samples = p.target_batch != p.batch;
    const int last = all_rows ? (int)p.queries : min(first + ROWS, (int)p.queries);
    const Real factor = MODE == AVERAGE ? 1 / (Real)p.heads : (Real)1;
    Scores sum;
    clear(sum);
    for (int64 n = all_samples ? 0 : target_sample; n < (all_samples ? p.batch : target_sample + 1); n++)
        for (int head = all_heads ? 0 : target_head; head < (all_heads ? (int)p.heads : target_head + 1); head++)
            for (int i = first; i < last; i += ROWS) {
                load_queries(p, shared, n, head, i, min(ROWS, last - i));
                if (next_block<ROWS, KEYS, THREADS>(p, *shared.panel, n, j) != j)
                    continue;
                const RowStatistics<M> rows =
                    load_statistics<ROWS, M>(p, exponent, *shared.panel, n, shared.first_row, GRADIENT);
                Scores x;
                weights_tile(p, shared, exponent, rows, n, head, j, x);
#pragma unroll
                for (int m = 0; m < M; m++)
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        const int r = shared.first_row + 16 * m + 8 * (e >> 1) + (lane_index() >> 2);
#pragma unroll
                        for (int c = 0; c < KEYS / 8; c++)
                            sum[m][c][e] += i + r < last ? x[m][c][e] * factor : 0;
                    }
            }
    if (GRADIENT && all_rows)
        sum_rows(shared, sum);
    const int count = block_keys<KEYS>(p, j);
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int r = shared.first_row + 16 * m + 8 * h + (lane_index() >> 2);
            if (all_rows ? r > 0 : first + r >= last)
                continue;
            const int64 start = element(p.target, target_sample, target_head, first + r) + j * p.target.column;
#pragma unroll
            for (int c = 0; c < KEYS / 8; c++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const int column = 8 * c + 2 * (lane_index() & 3) + e;
                    if (column < count)
                        store_one(p.target.storage, p.target.data, start + column * p.target.column,
                                  sum[m][c][2 * h + e]);
                }
        }
}

// DELTA and ROW_SCALE: sums over all keys of some rows of one head.
__device__ __forceinline__ void row_sums(const AttentionParams &p, const Shared &shared)
{
    const Exponent exponent(p);
    const int blocks = (int)((p.queries + ROWS - 1) / ROWS), i = (int)(blockIdx.x % blocks) * ROWS;
    const int head = (int)(blockIdx.x / blocks % p.heads), rows = min(ROWS, (int)p.queries - i);
    const int64 n = blockIdx.x / blocks / p.heads;
    load_queries(p, shared, n, head, i, rows);
    const Panel<ROWS> &panel = *shared.panel;
    const RowStatistics<M> statistics = load_statistics<ROWS, M>(p, exponent, panel, n, shared.first_row, false);
    Real sum[M][2];
#pragma unroll
    for (int m = 0; m < M; m++)
        sum[m][0] = sum[m][1] = 0;
    int j = next_block<ROWS, KEYS, THREADS>(p, panel, n, 0);
    while (j >= 0) {
        const int count = block_keys<KEYS>(p, j);
        Scores x, grad;
        weights_tile(p, shared, exponent, statistics, n, head, j, x);
        clear(grad);
        if (MODE == DELTA)
            add_grad_weights(p, panel, n, shared.first_row, j, count, grad);
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int c = 0; c < KEYS / 8; c++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    if (x[m][c][e] != 0)
                        sum[m][e >> 1] += MODE == DELTA ? x[m][c][e] * grad[m][c][e] : x[m][c][e];
        j = next_block<ROWS, KEYS, THREADS>(p, panel, n, j + count);
    }
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int r = shared.first_row + 16 * m + 8 * h + (lane_index() >> 2);
            const Real all = quad_sum(sum[m][h]);
            if (r >= rows || (lane_index() & 3) != 0)
                continue;
            const int64 row = (n * p.heads + head) * p.queries + i + r;
            if (MODE == DELTA)
                ((Real *)p.delta)[row] += all;
            else
                ((Real *)p.row_scale)[row] = all != 0 ? 1 / all : 0;
        }
}

KERNEL(THREADS) attention_weights(const __grid_constant__ AttentionParams p)
{
    unsigned char *cursor = shared_memory();
    Shared shared;
    shared.panel = (Panel<ROWS> *)carve(cursor, (sizeof(Panel<ROWS>) + 15) / 16 * 16);
    shared.query = (Stored *)carve(cursor, ROWS * Tile<Stored, D>::ROW_BYTES);
    shared.key = (Stored *)carve(cursor, KEYS * Tile<Stored, D>::ROW_BYTES);
    shared.grad_output = (Stored *)carve(cursor, GRADIENT ? ROWS * Tile<Stored, DV>::ROW_BYTES : 0);
    shared.value = (Stored *)carve(cursor, GRADIENT ? KEYS * Tile<Stored, DV>::ROW_BYTES : 0);
    shared.sums = (Real *)carve(cursor, GRADIENT ? WARPS * KEYS * (int)sizeof(Real) : 0);
    shared.first_row = 16 * M * warp_index();
    shared.draws = cursor + shared.first_row * (KEYS / 8 + 1);
    if (MODE == DELTA || MODE == ROW_SCALE)
        row_sums(p, shared);
    else
        target_tile(p, shared);
}
