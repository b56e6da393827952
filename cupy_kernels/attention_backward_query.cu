// Attention backward, the gradient of the queries: the forward's blocks of rows, and the products of the scores and of
// their gradients recomputed for every tile of keys. No sum crosses blocks of threads, so the bits are always the same.
#include "query_rows.cuh"

constexpr int WARPS = MHA_WARPS, THREADS = 32 * WARPS, M = MHA_ROW_TILES, ROWS = 16 * M * WARPS, KEYS = MHA_KEYS;
constexpr int D = MHA_HEAD_DIM, DV = MHA_V_HEAD_DIM, COLUMNS = MHA_COLUMNS, STAGES = MHA_STAGES;
constexpr bool ALIGNED = MHA_ALIGNED, DROPOUT = MHA_DROPOUT, SPARE = !MHA_TENSOR;
constexpr int ROW = Tile<Stored, D>::ROW_BYTES + Tile<Stored, DV>::ROW_BYTES; // of keys and values, or their gradients
constexpr int SHARED = (sizeof(Panel<ROWS>) + 15) / 16 * 16 + (ROWS + STAGES * KEYS) * ROW +
                       (SPARE ? ROWS * Tile<Real, KEYS>::ROW_BYTES : 0) + (DROPOUT ? ROWS * (KEYS / 8 + 1) : 0);
static_assert(SHARED == MHA_SHARED, "the plan reckons with another amount of shared memory");

KERNEL(THREADS) attention_backward_query(const __grid_constant__ AttentionParams p)
{
    unsigned char *cursor = shared_memory();
    Panel<ROWS> &panel = *(Panel<ROWS> *)carve(cursor, (sizeof(Panel<ROWS>) + 15) / 16 * 16);
    Stored *query = (Stored *)carve(cursor, ROWS * Tile<Stored, D>::ROW_BYTES);
    Stored *grad_output = (Stored *)carve(cursor, ROWS * Tile<Stored, DV>::ROW_BYTES);
    const Stored *own_query = query + 16 * M * warp_index() * Tile<Stored, D>::ROW; // this warp's
    const Stored *own_grad = grad_output + 16 * M * warp_index() * Tile<Stored, DV>::ROW;
    unsigned char *tiles = carve(cursor, STAGES * KEYS * ROW);
    const int first_row = 16 * M * warp_index();
    Real *spare = (Real *)(carve(cursor, SPARE ? ROWS * Tile<Real, KEYS>::ROW_BYTES : 0) +
                           first_row * Tile<Real, KEYS>::ROW_BYTES);
    unsigned char *draws = cursor + first_row * (KEYS / 8 + 1);
    const auto keys_of = [&](int stage) { return (Stored *)(tiles + stage * KEYS * ROW); };
    const auto values_of = [&](int stage) {
        return (Stored *)(tiles + stage * KEYS * ROW + KEYS * Tile<Stored, D>::ROW_BYTES);
    };

    const int64 total = p.heads / p.kv_heads * p.queries;
    const int64 blocks = (total + ROWS - 1) / ROWS, head = blockIdx.x / blocks;
    const int64 first = (blocks - 1 - blockIdx.x % blocks) * ROWS; // the last rows see most under a causal mask
    const int n = (int)(head / p.kv_heads);
    const int kv_head = (int)(head % p.kv_heads), rows = (int)min((int64)ROWS, total - first);
    const int column = blockIdx.y * COLUMNS; // of the gradient, where one block does not take all of them
    fill_panel<ROWS, THREADS>(p, panel, n, kv_head, first, rows);

    const auto load_keys = [&](int j, int stage) {
        const int count = block_keys<KEYS>(p, j);
        load_rows<ALIGNED, D, THREADS>(keys_of(stage), KEYS, p.key, (int)p.head_dim, [&](int r) {
            return r < count && key_exists(p, n, j + r) ? element(p.key, n, kv_head, j + r) : (int64)-1;
        });
        load_rows<ALIGNED, DV, THREADS>(values_of(stage), KEYS, p.value, (int)p.v_head_dim, [&](int r) {
            return r < count && key_exists(p, n, j + r) ? element(p.value, n, kv_head, j + r) : (int64)-1;
        });
        copy_async_commit();
    };
    load_rows<ALIGNED, D, THREADS>(query, ROWS, p.query, (int)p.head_dim, [&](int r) {
        return r < rows && panel.high[r] >= 0 ? element(p.query, n, panel.head[r], panel.query[r]) : (int64)-1;
    });
    load_rows<ALIGNED, DV, THREADS>(grad_output, ROWS, p.grad_output, (int)p.v_head_dim, [&](int r) {
        return r < rows && panel.high[r] >= 0 ? element(p.grad_output, n, panel.head[r], panel.query[r]) : (int64)-1;
    });

    const Exponent exponent(p);
    const RowStatistics<M> statistics = load_statistics<ROWS, M>(p, exponent, panel, n, first_row, true);
    Real grad_query[M][COLUMNS / 8][4];
    clear(grad_query);
    int stage = 0, j = next_block<ROWS, KEYS, THREADS>(p, panel, n, 0);
    if (j >= 0)
        load_keys(j, 0);
    while (j >= 0) {
        const int count = block_keys<KEYS>(p, j);
        const int next = next_block<ROWS, KEYS, THREADS>(p, panel, n, j + count);
        if (STAGES == 2 && next >= 0) {
            load_keys(next, stage ^ 1);
            copy_async_wait<1>();
        } else
            copy_async_wait<0>();
        __syncthreads(); // everyone's keys and values of this tile
        const Stored *key = keys_of(stage), *value = values_of(stage);
        Real weights[M][KEYS / 8][4], slope[M][KEYS / 8][4], grad[M][KEYS / 8][4];
        clear(weights);
        tile_scores<D>(weights, own_query, key);
        const bool partial = mask_scores(p, panel, n, first_row, j, count, weights, slope);
        replay_rows(exponent, statistics, true, weights);
        clear(grad);
        tile_scores<DV>(grad, own_grad, value);
        if (MASKS == ANYTHING && p.grad_weights.data)
            add_grad_weights(p, panel, n, first_row, j, count, grad);
        if (DROPOUT)
            drop_scores(p, panel, n, first_row, j, grad, draws);
        score_gradients(statistics, weights, grad);
        softcap_gradients(p, slope, grad);
        if (partial && __syncthreads_or(any_infinite<D, THREADS>(key, KEYS)))
            tile_accumulate_hiding<D>(grad_query, grad, key + column);
        else
            tile_accumulate<D>(grad_query, grad, key + column, spare);
        __syncthreads(); // everyone is done with this tile
        if (STAGES == 1 && next >= 0)
            load_keys(next, 0);
        stage ^= STAGES - 1;
        j = next;
    }

    const Real factor = (Real)(p.score_scale);
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int r = first_row + 16 * m + 8 * h + (lane_index() >> 2);
            if (r >= rows)
                continue;
            const int64 start = element(p.grad_query, n, panel.head[r], panel.query[r]) + column * p.grad_query.column;
#pragma unroll
            for (int c = 0; c < COLUMNS / 8; c++)
                store_two(p.grad_query, start, 8 * c + 2 * (lane_index() & 3), (int)p.head_dim - column,
                          grad_query[m][c][2 * h] * factor, grad_query[m][c][2 * h + 1] * factor);
        }
}
