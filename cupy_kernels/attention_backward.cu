// Attention backward, the gradients of keys and values: a block of threads owns ROWS keys of one key head and takes up,
// tile by tile, the queries of all the query heads that share it. Scores are computed transposed, rows are keys, so that
// their registers are the left operand of both products into the gradients. (Dao, "FlashAttention-2", 2023.)
#include "key_panel.cuh"

constexpr int WARPS = MHA_WARPS, THREADS = 32 * WARPS, M = MHA_ROW_TILES, ROWS = 16 * M * WARPS, QUERIES = MHA_KEYS;
constexpr int D = MHA_HEAD_DIM, DV = MHA_V_HEAD_DIM, STAGES = MHA_STAGES;
constexpr int COLUMNS = MHA_COLUMNS, V_COLUMNS = MHA_V_COLUMNS; // of the gradients that a block takes on
constexpr bool ALIGNED = MHA_ALIGNED, DROPOUT = MHA_DROPOUT, SPARE = !MHA_TENSOR;
constexpr int ROW = Tile<Stored, D>::ROW_BYTES + Tile<Stored, DV>::ROW_BYTES;
constexpr int PANEL = (sizeof(KeyPanel<QUERIES>) + 15) / 16 * 16;
constexpr int STAGE = PANEL + QUERIES * ROW;
constexpr int SHARED = ROWS * ROW + STAGES * STAGE + (SPARE ? ROWS * Tile<Real, QUERIES>::ROW_BYTES : 0) +
                       (DROPOUT ? WARPS * QUERIES * (2 * M + 1) : 0);
static_assert(SHARED == MHA_SHARED, "the plan reckons with another amount of shared memory");

KERNEL(THREADS) attention_backward(const __grid_constant__ AttentionParams p)
{
    unsigned char *cursor = shared_memory();
    Stored *key = (Stored *)carve(cursor, ROWS * Tile<Stored, D>::ROW_BYTES);
    Stored *value = (Stored *)carve(cursor, ROWS * Tile<Stored, DV>::ROW_BYTES);
    const Stored *own_key = key + 16 * M * warp_index() * Tile<Stored, D>::ROW; // this warp's
    const Stored *own_value = value + 16 * M * warp_index() * Tile<Stored, DV>::ROW;
    unsigned char *stages = carve(cursor, STAGES * STAGE);
    const int first_row = 16 * M * warp_index();
    Real *spare = (Real *)(carve(cursor, SPARE ? ROWS * Tile<Real, QUERIES>::ROW_BYTES : 0) +
                           first_row * Tile<Real, QUERIES>::ROW_BYTES);
    unsigned char *draws = cursor + warp_index() * QUERIES * (2 * M + 1);
    const auto panel_of = [&](int stage) { return (KeyPanel<QUERIES> *)(stages + stage * STAGE); };
    const auto queries_of = [&](int stage) { return (Stored *)(stages + stage * STAGE + PANEL); };
    const auto grads_of = [&](int stage) {
        return (Stored *)(stages + stage * STAGE + PANEL + QUERIES * Tile<Stored, D>::ROW_BYTES);
    };

    const int panels = key_panels(p, ROWS), index = blockIdx.x % panels; // the first keys are seen most under a causal
    const int n = (int)(blockIdx.x / panels / p.kv_heads);               // mask
    const int kv_head = (int)(blockIdx.x / panels % p.kv_heads), group = (int)(p.heads / p.kv_heads);
    int first, count;
    key_range(p, index, ROWS, first, count);
    const int tiles = (int)((p.queries + QUERIES - 1) / QUERIES);

    // The next tile, counted over all heads of the group, of which a query sees a key of the block; -1: none.
    const auto next_tile = [&](int t) {
        for (; t < group * tiles; t++) {
            if (MASKS == NOTHING_HIDDEN)
                return t;
            bool any = false;
            for (int i = t % tiles * QUERIES + threadIdx.x, c = threadIdx.x; c < QUERIES && i < p.queries;
                 i += THREADS, c += THREADS)
                any |= any_visible(p, n, i, first, count);
            if (__syncthreads_or(any))
                return t;
        }
        return -1;
    };
    const Exponent exponent(p);
    const auto load_queries = [&](int t, int stage) {
        const int head = kv_head * group + t / tiles, i = t % tiles * QUERIES;
        const auto exists = [&](int r) {
            return i + r < p.queries && !(MASKS != NOTHING_HIDDEN && p.query_lengths && i + r >= p.query_lengths[n]);
        };
        load_rows<ALIGNED, D, THREADS>(queries_of(stage), QUERIES, p.query, (int)p.head_dim,
                                       [&](int r) { return exists(r) ? element(p.query, n, head, i + r) : (int64)-1; });
        load_rows<ALIGNED, DV, THREADS>(grads_of(stage), QUERIES, p.grad_output, (int)p.v_head_dim, [&](int r) {
            return exists(r) ? element(p.grad_output, n, head, i + r) : (int64)-1;
        });
        copy_async_commit();
        if (warp_index() == 0)
            fill_key_panel(p, exponent, *panel_of(stage), n, head, i);
    };
    load_rows<ALIGNED, D, THREADS>(key, ROWS, p.key, (int)p.head_dim, [&](int r) {
        return r < count && key_exists(p, n, first + r) ? element(p.key, n, kv_head, first + r) : (int64)-1;
    });
    load_rows<ALIGNED, DV, THREADS>(value, ROWS, p.value, (int)p.v_head_dim, [&](int r) {
        return r < count && key_exists(p, n, first + r) ? element(p.value, n, kv_head, first + r) : (int64)-1;
    });

    Real grad_key[M][COLUMNS / 8][4], grad_value[M][V_COLUMNS / 8][4];
    clear(grad_key);
    clear(grad_value);
    int stage = 0, t = next_tile(0);
    if (t >= 0)
        load_queries(t, 0);
    while (t >= 0) {
        const int next = next_tile(t + 1);
        if (STAGES == 2 && next >= 0) {
            load_queries(next, stage ^ 1);
            copy_async_wait<1>();
        } else
            copy_async_wait<0>();
        __syncthreads(); // everyone's share of this tile
        const int head = kv_head * group + t / tiles, i = t % tiles * QUERIES;
        const Stored *query = queries_of(stage), *grad_output = grads_of(stage);
        const KeyPanel<QUERIES> &panel = *panel_of(stage);
        Real weights[M][QUERIES / 8][4], slope[M][QUERIES / 8][4], grad[M][QUERIES / 8][4];
        clear(weights);
        tile_scores<D>(weights, own_key, query);
        const bool partial = mask_query_scores(p, panel, n, head, i, first, count, first + first_row, weights, slope);
        clear(grad);
        tile_scores<DV>(grad, own_value, grad_output);
#pragma unroll
        for (int c = 0; c < QUERIES / 8; c++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const int q = 8 * c + 2 * (lane_index() & 3) + e;
                const Real base = panel.base[q], scale = panel.scale[q];
#pragma unroll
                for (int m = 0; m < M; m++)
#pragma unroll
                    for (int h = 0; h < 2; h++) {
                        const int j = first + first_row + 16 * m + 8 * h + (lane_index() >> 2);
                        weights[m][c][2 * h + e] = softmax_replay(exponent, weights[m][c][2 * h + e], base, scale);
                        if (MASKS == ANYTHING && p.grad_weights.data && i + q < p.queries && j < first + count)
                            grad[m][c][2 * h + e] +=
                                load_one(p.grad_weights.storage, p.grad_weights.data,
                                         element(p.grad_weights, n, head, i + q) + j * p.grad_weights.column) *
                                (Real)p.grad_weights_scale;
                    }
            }
        if (DROPOUT)
            fill_draws(p, n, QUERIES, 2 * M + 1, first + first_row, draws, [&](int r, int &its_head, int &its_query) {
                its_head = head;
                its_query = i + r;
            });
        const bool hiding_grads = partial && __syncthreads_or(any_infinite<DV, THREADS>(grad_output, QUERIES));
        const bool hiding_queries = partial && __syncthreads_or(any_infinite<D, THREADS>(query, QUERIES));
        // The weights' registers serve twice: dropped for the values, as they are for the gradient of the scores.
        Real dropped[M][QUERIES / 8][4];
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int c = 0; c < QUERIES / 8; c++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    dropped[m][c][e] = weights[m][c][e];
        if (DROPOUT) {
            drop_query_scores(p, n, head, i, first + first_row, dropped, draws);
            drop_query_scores(p, n, head, i, first + first_row, grad, draws);
        }
        const int part = blockIdx.y;
        if (hiding_grads)
            tile_accumulate_hiding<DV>(grad_value, dropped, grad_output + part * V_COLUMNS);
        else
            tile_accumulate<DV>(grad_value, dropped, grad_output + part * V_COLUMNS, spare);
#pragma unroll
        for (int c = 0; c < QUERIES / 8; c++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const Real delta = panel.delta[8 * c + 2 * (lane_index() & 3) + e];
#pragma unroll
                for (int m = 0; m < M; m++)
#pragma unroll
                    for (int h = 0; h < 2; h++) {
                        Real &x = grad[m][c][2 * h + e];
                        x = softmax_gradient(weights[m][c][2 * h + e], x, delta);
                        if (MASKS == ANYTHING && p.softcap != 0)
                            x = softcap_gradient(x, slope[m][c][2 * h + e]);
                    }
            }
        if (hiding_queries)
            tile_accumulate_hiding<D>(grad_key, grad, query + part * COLUMNS);
        else
            tile_accumulate<D>(grad_key, grad, query + part * COLUMNS, spare);
        __syncthreads(); // everyone is done with this tile
        if (STAGES == 1 && next >= 0)
            load_queries(next, 0);
        stage ^= STAGES - 1;
        t = next;
    }

    const Real factor = (Real)(p.score_scale);
    const int column = blockIdx.y * COLUMNS, v_column = blockIdx.y * V_COLUMNS;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int r = first_row + 16 * m + 8 * h + (lane_index() >> 2);
            if (r >= count)
                continue;
            const int64 row = element(p.grad_key, n, kv_head, first + r) + column * p.grad_key.column;
            const int64 v_row = element(p.grad_value, n, kv_head, first + r) + v_column * p.grad_value.column;
#pragma unroll
            for (int c = 0; c < COLUMNS / 8; c++)
                store_two(p.grad_key, row, 8 * c + 2 * (lane_index() & 3), (int)p.head_dim - column,
                          grad_key[m][c][2 * h] * factor, grad_key[m][c][2 * h + 1] * factor);
#pragma unroll
            for (int c = 0; c < V_COLUMNS / 8; c++)
                store_two(p.grad_value, v_row, 8 * c + 2 * (lane_index() & 3), (int)p.v_head_dim - v_column,
                          grad_value[m][c][2 * h], grad_value[m][c][2 * h + 1]);
        }
}
