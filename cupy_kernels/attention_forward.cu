// Attention forward: blocks of keys against blocks of query rows, online softmax, nothing of size L x S.
//
// A block of threads owns ROWS query rows of one key head; each warp owns whole rows, so that the softmax needs no shared
// memory and the weights go from the first product into the second in registers. While one product runs, the other's
// operand is on its way. (Dao, "FlashAttention-2", 2023.)
#include "online_softmax.cuh"

constexpr int WARPS = MHA_WARPS, THREADS = 32 * WARPS, M = MHA_ROW_TILES, ROWS = 16 * M * WARPS, KEYS = MHA_KEYS;
constexpr int D = MHA_HEAD_DIM, DV = MHA_V_COLUMNS; // as compiled, multiples of 16
constexpr bool ALIGNED = MHA_ALIGNED, DROPOUT = MHA_DROPOUT, SPARE = !MHA_TENSOR;
constexpr int SHARED = (sizeof(Panel<ROWS>) + 15) / 16 * 16 + ROWS * Tile<Stored, D>::ROW_BYTES +
                       KEYS * (Tile<Stored, D>::ROW_BYTES + Tile<Stored, DV>::ROW_BYTES) +
                       (SPARE ? ROWS * Tile<Real, KEYS>::ROW_BYTES : 0) + (DROPOUT ? ROWS * (KEYS / 8 + 1) : 0);
static_assert(SHARED == MHA_SHARED, "the plan reckons with another amount of shared memory");

KERNEL(THREADS) attention_forward(const __grid_constant__ AttentionParams p)
{
    unsigned char *cursor = shared_memory();
    Panel<ROWS> &panel = *(Panel<ROWS> *)carve(cursor, (sizeof(Panel<ROWS>) + 15) / 16 * 16);
    Stored *query = (Stored *)carve(cursor, ROWS * Tile<Stored, D>::ROW_BYTES);
    const Stored *own_query = query + 16 * M * warp_index() * Tile<Stored, D>::ROW; // this warp's
    Stored *key = (Stored *)carve(cursor, KEYS * Tile<Stored, D>::ROW_BYTES);
    Stored *value = (Stored *)carve(cursor, KEYS * Tile<Stored, DV>::ROW_BYTES);
    const int first_row = 16 * M * warp_index();
    Real *spare = (Real *)(carve(cursor, SPARE ? ROWS * Tile<Real, KEYS>::ROW_BYTES : 0) +
                           first_row * Tile<Real, KEYS>::ROW_BYTES);
    unsigned char *draws = cursor + first_row * (KEYS / 8 + 1);

    const int64 total = p.heads / p.kv_heads * p.queries;
    const int64 blocks = (total + ROWS - 1) / ROWS, head = blockIdx.x / blocks;
    const int64 first = (blocks - 1 - blockIdx.x % blocks) * ROWS; // the last rows see most under a causal mask
    const int n = (int)(head / p.kv_heads);
    const int kv_head = (int)(head % p.kv_heads), rows = (int)min((int64)ROWS, total - first);
    const int column = blockIdx.y * DV; // of the output, where one block does not take all of them
    fill_panel<ROWS, THREADS>(p, panel, n, kv_head, first, rows);

    const auto load_keys = [&](int j) {
        const int count = block_keys<KEYS>(p, j);
        load_rows<ALIGNED, D, THREADS>(key, KEYS, p.key, (int)p.head_dim, [&](int r) {
            return r < count && key_exists(p, n, j + r) ? element(p.key, n, kv_head, j + r) : (int64)-1;
        });
        copy_async_commit();
    };
    const auto load_values = [&](int j) {
        const int count = block_keys<KEYS>(p, j);
        load_rows<ALIGNED, DV, THREADS>(value, KEYS, p.value, (int)p.v_head_dim - column, [&](int r) {
            const int64 start = element(p.value, n, kv_head, j + r) + column * p.value.column;
            return r < count && key_exists(p, n, j + r) ? start : (int64)-1;
        });
        copy_async_commit();
    };

    Real out[M][DV / 8][4], maximum[M][2], sum[M][2];
    clear(out);
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            maximum[m][h] = -(Real)infinity();
            sum[m][h] = 0;
        }
    const Exponent exponent(p);
    load_rows<ALIGNED, D, THREADS>(query, ROWS, p.query, (int)p.head_dim, [&](int r) {
        return r < rows && panel.high[r] >= 0 ? element(p.query, n, panel.head[r], panel.query[r]) : (int64)-1;
    });
    int j = next_block<ROWS, KEYS, THREADS>(p, panel, n, 0);
    if (j >= 0)
        load_keys(j);
    while (j >= 0) {
        const int count = block_keys<KEYS>(p, j);
        const int next = next_block<ROWS, KEYS, THREADS>(p, panel, n, j + count);
        copy_async_wait<0>(); // the keys, and at first the queries
        __syncthreads();      // everyone's; and everyone is done with the values
        load_values(j);
        Real s[M][KEYS / 8][4], slope[M][KEYS / 8][4];
        clear(s);
        tile_scores<D>(s, own_query, key);
        copy_async_wait<0>();
        __syncthreads(); // everyone's values, and everyone is done with the keys
        if (next >= 0)
            load_keys(next);
        const bool partial = mask_scores(p, panel, n, first_row, j, count, s, slope);
        softmax_absorb(exponent, s, maximum, sum, out);
        if (DROPOUT)
            drop_scores(p, panel, n, first_row, j, s, draws);
        if (partial && __syncthreads_or(any_infinite<DV, THREADS>(value, KEYS)))
            tile_accumulate_hiding<DV>(out, s, value);
        else
            tile_accumulate<DV>(out, s, value, spare);
        j = next;
    }

#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int r = first_row + 16 * m + 8 * h + (lane_index() >> 2);
            const Real all = quad_sum(sum[m][h]), factor = all != 0 ? 1 / all : 0;
            if (r >= rows)
                continue;
            if ((lane_index() & 3) == 0 && column == 0)
                store_statistics(p, (n * p.heads + panel.head[r]) * p.queries + panel.query[r], maximum[m][h], all);
            const int64 start = element(p.output, n, panel.head[r], panel.query[r]) + column * p.output.column;
#pragma unroll
            for (int c = 0; c < DV / 8; c++)
                store_two(p.output, start, 8 * c + 2 * (lane_index() & 3), (int)p.v_head_dim - column,
                          out[m][c][2 * h] * factor, out[m][c][2 * h + 1] * factor);
        }
}
