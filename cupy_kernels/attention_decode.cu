// Attention forward for few queries against many keys, as in decoding: the keys are split over blocks of threads.
//
// The memory bandwidth decides here. All queries that share a key head are the 16 rows of one warp, so every key is read
// once; a block is one warp, several of them fit on a multiprocessor, and each has STAGES tiles of keys and values under
// way. Every part leaves its output, maximum and sum, which a second kernel combines in their order. ("Flash-Decoding",
// Dao et al., 2023.)
#include "online_softmax.cuh"

constexpr int THREADS = 32, ROWS = 16, M = 1, KEYS = MHA_KEYS, STAGES = MHA_STAGES;
constexpr int D = MHA_HEAD_DIM, DV = MHA_V_COLUMNS;
constexpr bool ALIGNED = MHA_ALIGNED, DROPOUT = MHA_DROPOUT, SPARE = !MHA_TENSOR;
constexpr int ROW = Tile<Stored, D>::ROW_BYTES + Tile<Stored, DV>::ROW_BYTES;
constexpr int SHARED = (sizeof(Panel<ROWS>) + 15) / 16 * 16 + ROWS * Tile<Stored, D>::ROW_BYTES + STAGES * KEYS * ROW +
                       (SPARE ? ROWS * Tile<Real, KEYS>::ROW_BYTES : 0) + (DROPOUT ? ROWS * (KEYS / 8 + 1) : 0);
static_assert(SHARED == MHA_SHARED, "the plan reckons with another amount of shared memory");

// The partial result of a split: outputs [rows][Dv], then maxima and sums.
__device__ __forceinline__ int64 partial_size(const AttentionParams &p)
{
    return p.heads / p.kv_heads * p.queries * (p.v_head_dim + 2);
}

KERNEL(THREADS) attention_decode(const __grid_constant__ AttentionParams p)
{
    unsigned char *cursor = shared_memory();
    Panel<ROWS> &panel = *(Panel<ROWS> *)carve(cursor, (sizeof(Panel<ROWS>) + 15) / 16 * 16);
    Stored *query = (Stored *)carve(cursor, ROWS * Tile<Stored, D>::ROW_BYTES);
    unsigned char *tiles = carve(cursor, STAGES * KEYS * ROW);
    Real *spare = (Real *)carve(cursor, SPARE ? ROWS * Tile<Real, KEYS>::ROW_BYTES : 0);
    unsigned char *draws = cursor;

    const int split = (int)(blockIdx.x % p.splits), kv_head = (int)(blockIdx.x / p.splits % p.kv_heads);
    const int64 n = blockIdx.x / p.splits / p.kv_heads;
    const int rows = (int)(p.heads / p.kv_heads * p.queries), column = blockIdx.y * DV;
    fill_panel<ROWS, THREADS>(p, panel, n, kv_head, 0, rows);
    load_rows<ALIGNED, D, THREADS>(query, ROWS, p.query, (int)p.head_dim, [&](int r) {
        return r < rows && panel.high[r] >= 0 ? element(p.query, n, panel.head[r], panel.query[r]) : (int64)-1;
    });

    // This split's share of the tiles that hold a visible key, the appended keys' own tiles last.
    const int own = own_keys(p), start = MASKS == NOTHING_HIDDEN ? 0 : min(panel.start, own) / KEYS;
    const int stop = MASKS == NOTHING_HIDDEN ? (own + KEYS - 1) / KEYS : (min(panel.stop, own) + KEYS - 1) / KEYS;
    const int own_tiles = max(0, stop - start), appended = ((int)p.keys - own + KEYS - 1) / KEYS;
    const int64 all = own_tiles + appended;
    const int first = (int)(split * all / p.splits), last = (int)((split + 1) * all / p.splits);
    const auto key_of = [&](int t) { return t < own_tiles ? (start + t) * KEYS : own + (t - own_tiles) * KEYS; };
    const auto load_tile = [&](int t) {
        if (t < last) {
            const int j = key_of(t), count = block_keys<KEYS>(p, j);
            unsigned char *tile = tiles + (t - first) % STAGES * KEYS * ROW;
            load_rows<ALIGNED, D, THREADS>((Stored *)tile, KEYS, p.key, (int)p.head_dim, [&](int r) {
                return r < count && key_exists(p, n, j + r) ? element(p.key, n, kv_head, j + r) : (int64)-1;
            });
            load_rows<ALIGNED, DV, THREADS>((Stored *)(tile + KEYS * Tile<Stored, D>::ROW_BYTES), KEYS, p.value,
                                            (int)p.v_head_dim - column, [&](int r) {
                                                return r < count && key_exists(p, n, j + r)
                                                           ? element(p.value, n, kv_head, j + r) +
                                                                 column * p.value.column
                                                           : (int64)-1;
                                            });
        }
        copy_async_commit(); // an empty group too: the wait below counts groups
    };

    Real out[M][DV / 8][4], maximum[M][2] = {{-(Real)infinity(), -(Real)infinity()}}, sum[M][2] = {{0, 0}};
    clear(out);
    const Exponent exponent(p);
    for (int t = first; t < first + STAGES - 1; t++)
        load_tile(t);
    for (int t = first; t < last; t++) {
        load_tile(t + STAGES - 1);
        copy_async_wait<STAGES - 1>();
        __syncthreads();
        const int j = key_of(t), count = block_keys<KEYS>(p, j);
        const Stored *key = (const Stored *)(tiles + (t - first) % STAGES * KEYS * ROW);
        const Stored *value = key + KEYS * Tile<Stored, D>::ROW_BYTES / sizeof(Stored);
        Real s[M][KEYS / 8][4], slope[M][KEYS / 8][4];
        clear(s);
        tile_scores<D>(s, query, key);
        const bool partial = mask_scores(p, panel, n, 0, j, count, s, slope);
        softmax_absorb(exponent, s, maximum, sum, out);
        if (DROPOUT)
            drop_scores(p, panel, n, 0, j, s, draws);
        if (partial && __syncthreads_or(any_infinite<DV, THREADS>(value, KEYS)))
            tile_accumulate_hiding<DV>(out, s, value);
        else
            tile_accumulate<DV>(out, s, value, spare);
        __syncthreads(); // the tile may be overwritten
    }

    Real *partial = (Real *)p.partials + blockIdx.x * partial_size(p);
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int r = 8 * h + (lane_index() >> 2);
        const Real total = quad_sum(sum[0][h]);
        if (r >= rows)
            continue;
        if ((lane_index() & 3) == 0 && column == 0) {
            partial[rows * p.v_head_dim + r] = maximum[0][h];
            partial[rows * (p.v_head_dim + 1) + r] = total;
        }
#pragma unroll
        for (int c = 0; c < DV / 8; c++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const int d = column + 8 * c + 2 * (lane_index() & 3) + e;
                if (d < p.v_head_dim)
                    partial[r * p.v_head_dim + d] = out[0][c][2 * h + e];
            }
    }
}

// One row of one key head: the splits' results in their order.
KERNEL(128) attention_combine(const __grid_constant__ AttentionParams p)
{
    const int rows = (int)(p.heads / p.kv_heads * p.queries), r = blockIdx.x % rows;
    const int64 item = blockIdx.x / rows, n = item / p.kv_heads, size = partial_size(p);
    const int kv_head = (int)(item % p.kv_heads);
    const Real *first = (const Real *)p.partials + item * p.splits * size;
    const Real *maxima = first + rows * p.v_head_dim + r, *sums = maxima + rows;
    Real top = -(Real)infinity(), total = 0;
    for (int64 split = 0; split < p.splits; split++)
        top = maxima[split * size] > top ? maxima[split * size] : top;
    const Real base = top == -(Real)infinity() ? (Real)0 : top;
    for (int64 split = 0; split < p.splits; split++)
        total += sums[split * size] * exponential(maxima[split * size] - base);
    const int64 head = kv_head * (p.heads / p.kv_heads) + r / p.queries, i = r % p.queries;
    if (threadIdx.x == 0)
        store_statistics(p, (n * p.heads + head) * p.queries + i, top, total);
    for (int d = threadIdx.x; d < p.v_head_dim; d += 128) {
        Real out = 0;
        for (int64 split = 0; split < p.splits; split++)
            out += first[split * size + r * p.v_head_dim + d] * exponential(maxima[split * size] - base);
        const Real value = out * (total != 0 ? 1 / total : 0);
        to_stored(((Stored *)p.output.data)[element(p.output, n, head, i) + d * p.output.column], value);
    }
}
