// Tiles in shared memory and the two products of attention, for every family of instructions.
//
// A warp owns 16 rows, or ROW_TILES times 16. Its results lie in registers as the matrix instructions have it:
// x[m][j] is the piece of rows 16 m .. 16 m + 16, columns 8 j .. 8 j + 8, of which lane 4 g + t holds
//     x[m][j][0], x[m][j][1]: row 16 m + g,     columns 8 j + 2 t and 8 j + 2 t + 1
//     x[m][j][2], x[m][j][3]: row 16 m + g + 8, the same columns.
// Families without such instructions keep the layout, so that masks and softmax are written once.
#pragma once
#include "lanes.cuh"

// Rows of COLUMNS elements of T in shared memory. The 16-byte chunks of a row are permuted, so that the same chunk of
// eight neighbouring rows, which is what a warp reads at a time, lies in different banks.
template <class T, int COLUMNS> struct Tile {
    static constexpr int CHUNK = 16 / sizeof(T);
    static constexpr int FILLED = (COLUMNS + CHUNK - 1) / CHUNK;
    static constexpr int CHUNKS = FILLED <= 2 ? FILLED : FILLED <= 4 ? 4 : (FILLED + 7) / 8 * 8; // of a row
    static constexpr int ROW_BYTES = CHUNKS * 16;

    static constexpr int ROW = CHUNKS * CHUNK; // elements from row to row

    static __device__ __forceinline__ int permuted(int row, int c)
    {
        return c ^ (CHUNKS >= 8 ? row & 7 : row * CHUNKS >> 3 & (CHUNKS - 1));
    }
    static __device__ __forceinline__ T *chunk(T *tile, int row, int c)
    {
        return tile + row * ROW + permuted(row, c) * CHUNK;
    }
    static __device__ __forceinline__ T *at(T *tile, int row, int column)
    {
        return chunk(tile, row, column / CHUNK) + column % CHUNK;
    }
    // Where chunk fixed_c + c of row fixed_row + row lies, in bytes. The fixed parts are known to the compiler, fixed_row is
    // a multiple of eight and no bit is set in both of the others: few addresses, and what is fixed is added by the
    // instruction itself. With an address for each chunk the backward spills.
    static __device__ __forceinline__ int offset(int fixed_row, int row, int fixed_c, int c)
    {
        return row * ROW_BYTES + (permuted(row, c) ^ (fixed_c & 7)) * 16 + fixed_row * ROW_BYTES + (fixed_c & ~7) * 16;
    }
    static __device__ __forceinline__ const T *chunk(const T *tile, int fixed_row, int row, int fixed_c, int c)
    {
        return (const T *)((const unsigned char *)tile + offset(fixed_row, row, fixed_c, c));
    }
    static __device__ __forceinline__ const T *chunk(const T *tile, int row, int c) { return chunk((T *)tile, row, c); }
    static __device__ __forceinline__ const T *at(const T *tile, int row, int column)
    {
        return at((T *)tile, row, column);
    }
};

template <int M, int N> __device__ __forceinline__ void clear(Real (&x)[M][N][4])
{
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int j = 0; j < N; j++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                x[m][j][i] = 0;
}

struct __align__(2 * sizeof(Stored)) Pair {
    Stored x[2];
};

// This lane's columns 8 j + 2 t and the next of a row; j is a constant.
template <int COLUMNS> __device__ __forceinline__ Pair load_pair(const Stored *tile, int row, int j)
{
    typedef Tile<Stored, COLUMNS> Rows;
    const int column = 2 * (lane_index() & 3);
    return *(const Pair *)(Rows::chunk(tile, 0, row, 8 / Rows::CHUNK * j, column / Rows::CHUNK) + column % Rows::CHUNK);
}

#if MHA_TENSOR

// A step is what one instruction sums over: `Left` is 16 rows of it, `Right` 8 columns.
#if MHA_STORAGE == 0
// Three products of tf32 parts make up for most of what one of them loses: 21 bits instead of 11.
constexpr int STEP = 8;
struct Left {
    uint32 high[4], low[4];
};
struct Right {
    uint32 high[2], low[2];
};
__device__ __forceinline__ void split(float x, uint32 &high, uint32 &low)
{
    high = to_tf32(x);
    low = to_tf32(x - __uint_as_float(high));
}
__device__ __forceinline__ void multiply(float (&c)[4], const Left &a, const Right &b)
{
    mma_tf32(c, a.low, b.high[0], b.high[1]);
    mma_tf32(c, a.high, b.low[0], b.low[1]);
    mma_tf32(c, a.high, b.high[0], b.high[1]);
}
__device__ __forceinline__ Left left_of(const uint32 (&x)[4])
{
    Left a;
#pragma unroll
    for (int i = 0; i < 4; i++)
        split(__uint_as_float(x[i]), a.high[i], a.low[i]);
    return a;
}
__device__ __forceinline__ Right right_of(uint32 x0, uint32 x1)
{
    Right b;
    split(__uint_as_float(x0), b.high[0], b.low[0]);
    split(__uint_as_float(x1), b.high[1], b.low[1]);
    return b;
}
#elif MHA_STORAGE == 1
constexpr int STEP = 8;
struct Left {
    double x[4];
};
struct Right {
    double x[2];
};
__device__ __forceinline__ void multiply(double (&c)[4], const Left &a, const Right &b)
{
    mma_float64(c[0], c[1], a.x[0], b.x[0]);
    mma_float64(c[2], c[3], a.x[1], b.x[0]);
    mma_float64(c[0], c[1], a.x[2], b.x[1]);
    mma_float64(c[2], c[3], a.x[3], b.x[1]);
}
#else
constexpr int STEP = 16;
struct Left {
    uint32 x[4];
};
struct Right {
    uint32 x[2];
};
__device__ __forceinline__ void multiply(float (&c)[4], const Left &a, const Right &b)
{
    if (STORAGE == BFLOAT16)
        mma_bfloat16(c, a.x, b.x[0], b.x[1]);
    else
        mma_float16(c, a.x, b.x[0], b.x[1]);
}
__device__ __forceinline__ Left left_of(const uint32 (&x)[4])
{
    Left a;
#pragma unroll
    for (int i = 0; i < 4; i++)
        a.x[i] = x[i];
    return a;
}
__device__ __forceinline__ Right right_of(uint32 x0, uint32 x1)
{
    Right b;
    b.x[0] = x0;
    b.x[1] = x1;
    return b;
}
__device__ __forceinline__ uint32 pack_two(float low, float high)
{
    return STORAGE == BFLOAT16 ? pack_bfloat16(low, high) : pack_float16(low, high);
}
#endif

// Rows `row` .. row + 16 of a tile, step k; both are constants.
template <int COLUMNS> __device__ __forceinline__ Left load_left(const Stored *tile, int row, int k)
{
    typedef Tile<Stored, COLUMNS> Rows;
    const int lane = lane_index();
#if MHA_STORAGE == 1
    Left a;
#pragma unroll
    for (int i = 0; i < 4; i++)
        a.x[i] = Rows::chunk(tile, row + 8 * (i & 1), lane >> 2, 4 * k + 2 * (i >> 1), lane >> 1 & 1)[lane & 1];
    return a;
#else
    uint32 x[4]; // a float is a pair of 16-bit elements to ldmatrix
    ldmatrix_x4(x, shared_address(tile) + Rows::offset(row, lane & 15, 2 * k, lane >> 4));
    return left_of(x);
#endif
}

// Step k of rows `row` .. row + 16 of a tile, as columns of the right operand: two of its pieces. Both are constants.
template <int COLUMNS> __device__ __forceinline__ void load_rights(Right (&b)[2], const Stored *tile, int row, int k)
{
    typedef Tile<Stored, COLUMNS> Rows;
    const int lane = lane_index();
#if MHA_STORAGE == 1
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int h = 0; h < 2; h++)
            b[i].x[h] = Rows::chunk(tile, row + 8 * i, lane >> 2, 4 * k + 2 * h, lane >> 1 & 1)[lane & 1];
#else
    uint32 x[4];
    ldmatrix_x4(x, shared_address(tile) + Rows::offset(row, (lane & 7) + (lane >> 4 << 3), 2 * k, lane >> 3 & 1));
    b[0] = right_of(x[0], x[1]);
    b[1] = right_of(x[2], x[3]);
#endif
}

// x += 16 M rows, those of this warp, times the transposed rows of `tile`
template <int COLUMNS, int M, int N>
__device__ __forceinline__ void tile_scores(Real (&x)[M][N][4], const Stored *rows, const Stored *tile)
{
#pragma unroll(STORAGE == FLOAT64 ? 2 : COLUMNS / STEP) // doubles fetched ahead would spill
    for (int k = 0; k < COLUMNS / STEP; k++) {
        Left a[M];
#pragma unroll
        for (int m = 0; m < M; m++)
            a[m] = load_left<COLUMNS>(rows, 16 * m, k);
#pragma unroll
        for (int j = 0; j < N; j += 2) {
            Right b[2];
            load_rights<COLUMNS>(b, tile, 8 * j, k);
#pragma unroll
            for (int m = 0; m < M; m++) {
                multiply(x[m][j], a[m], b[0]);
                multiply(x[m][j + 1], a[m], b[1]);
            }
        }
    }
}

// out += p times the first columns of `tile`; p lies in registers, its columns are the rows of the tile.
#if MHA_STORAGE >= 2
template <int COLUMNS, int M, int N, int C>
__device__ __forceinline__ void tile_accumulate(Real (&out)[M][C][4], Real (&p)[M][N][4], const Stored *tile, Real *)
{
    typedef Tile<Stored, COLUMNS> Rows;
    const int lane = lane_index();
#pragma unroll
    for (int k = 0; k < N; k += 2) {
        Left a[M];
#pragma unroll
        for (int m = 0; m < M; m++) {
            a[m].x[0] = pack_two(p[m][k][0], p[m][k][1]);
            a[m].x[1] = pack_two(p[m][k][2], p[m][k][3]);
            a[m].x[2] = pack_two(p[m][k + 1][0], p[m][k + 1][1]);
            a[m].x[3] = pack_two(p[m][k + 1][2], p[m][k + 1][3]);
        }
#pragma unroll
        for (int j = 0; j < C; j += 2) {
            uint32 x[4];
            ldmatrix_x4_trans(x, shared_address(tile) + Rows::offset(8 * k, lane & 15, j, lane >> 4));
#pragma unroll
            for (int m = 0; m < M; m++) {
                multiply(out[m][j], a[m], right_of(x[0], x[1]));
                multiply(out[m][j + 1], a[m], right_of(x[2], x[3]));
            }
        }
    }
}
#else
// The order of the sum over the tile's rows is free, so the step takes them as the registers of p lie: 0, 2, 4, 6 and
// then 1, 3, 5, 7. The sum over a tile is added to `out` at its end, which keeps the error of long sums small.
template <int COLUMNS, int M, int N, int C>
__device__ __forceinline__ void tile_accumulate(Real (&out)[M][C][4], Real (&p)[M][N][4], const Stored *tile, Real *)
{
    typedef Tile<Stored, COLUMNS> Rows;
    const int g = lane_index() >> 2, t = lane_index() & 3;
#pragma unroll
    for (int j = 0; j < C; j++) {
        Real sum[M][1][4];
        clear(sum);
#pragma unroll
        for (int k = 0; k < N; k++) {
            constexpr int CHUNK = Rows::CHUNK; // columns 8 j + g of rows 8 k + 2 t and the next
            const Real b0 = Rows::chunk(tile, 8 * k, 2 * t, 8 / CHUNK * j, g / CHUNK)[g % CHUNK];
            const Real b1 = Rows::chunk(tile, 8 * k, 2 * t + 1, 8 / CHUNK * j, g / CHUNK)[g % CHUNK];
#pragma unroll
            for (int m = 0; m < M; m++) {
#if MHA_STORAGE == 1
                const Left a = {{p[m][k][0], p[m][k][2], p[m][k][1], p[m][k][3]}};
                const Right b = {{b0, b1}};
#else
                const uint32 x[4] = {__float_as_uint(p[m][k][0]), __float_as_uint(p[m][k][2]),
                                     __float_as_uint(p[m][k][1]), __float_as_uint(p[m][k][3])};
                const Left a = left_of(x);
                const Right b = right_of(__float_as_uint(b0), __float_as_uint(b1));
#endif
                multiply(sum[m][0], a, b);
            }
        }
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                out[m][j][i] += sum[m][0][i];
    }
}
#endif

#else // plain multiplications and additions: exact float32, and whatever has no matrix instructions

template <int COLUMNS>
__device__ __forceinline__ void load_chunk(Real (&x)[CHUNK], const Stored *tile, int fixed_row, int row, int c)
{
    struct __align__(16) Chunk {
        Stored x[CHUNK];
    };
    const Chunk chunk =
        *(const Chunk *)(Tile<Stored, COLUMNS>::chunk(tile, row, c) + fixed_row * Tile<Stored, COLUMNS>::ROW);
#pragma unroll
    for (int i = 0; i < CHUNK; i++)
        x[i] = to_real(chunk.x[i]);
}

// x += 16 M rows, those of this warp, times the transposed rows of `tile`
template <int COLUMNS, int M, int N>
__device__ __forceinline__ void tile_scores(Real (&x)[M][N][4], const Stored *rows, const Stored *tile)
{
    const int g = lane_index() >> 2, t = lane_index() & 3;
#pragma unroll 2
    for (int c = 0; c < COLUMNS / CHUNK; c++) {
        Real a[M][2][CHUNK];
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int h = 0; h < 2; h++)
                load_chunk<COLUMNS>(a[m][h], rows, 16 * m + 8 * h, g, c);
#pragma unroll
        for (int j = 0; j < N; j++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                Real b[CHUNK];
                load_chunk<COLUMNS>(b, tile, 8 * j, 2 * t + e, c);
#pragma unroll
                for (int m = 0; m < M; m++)
#pragma unroll
                    for (int h = 0; h < 2; h++)
#pragma unroll
                        for (int i = 0; i < CHUNK; i++)
                            x[m][j][2 * h + e] += a[m][h][i] * b[i];
            }
    }
}

// out += p times the first columns of `tile`; p lies in registers, its columns are the rows of the tile. Every lane
// needs whole rows of p, so it takes the way through `spare`, shared memory of this warp: [16 M][8 N]. The sum over a
// tile is added to `out` at its end, which keeps the error of long sums small.
template <int COLUMNS, int M, int N, int C>
__device__ __forceinline__ void tile_accumulate(Real (&out)[M][C][4], Real (&p)[M][N][4], const Stored *tile,
                                                Real *spare)
{
    typedef Tile<Real, 8 * N> Weights;
    constexpr int WIDE = Weights::CHUNK, GROUP = C % 4 == 0 ? 4 : C % 2 == 0 ? 2 : 1;
    const int g = lane_index() >> 2, t = lane_index() & 3;
    __syncwarp();
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int j = 0; j < N; j++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                *Weights::at(spare, 16 * m + g + 8 * (i >> 1), 8 * j + 2 * t + (i & 1)) = p[m][j][i];
    __syncwarp();
#pragma unroll
    for (int first = 0; first < C; first += GROUP) {
        Real sum[M][GROUP][4];
        clear(sum);
#pragma unroll 2
        for (int k = 0; k < 8 * N; k += WIDE) {
            struct __align__(16) Chunk {
                Real x[WIDE];
            };
            Chunk a[M][2];
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int h = 0; h < 2; h++)
                    a[m][h] = *(const Chunk *)Weights::chunk(spare, 16 * m + 8 * h + g, k / WIDE);
#pragma unroll
            for (int i = 0; i < WIDE; i++)
#pragma unroll
                for (int j = 0; j < GROUP; j++) {
                    const Pair b = load_pair<COLUMNS>(tile, k + i, first + j);
#pragma unroll
                    for (int m = 0; m < M; m++)
#pragma unroll
                        for (int h = 0; h < 2; h++) {
                            sum[m][j][2 * h] += a[m][h].x[i] * to_real(b.x[0]);
                            sum[m][j][2 * h + 1] += a[m][h].x[i] * to_real(b.x[1]);
                        }
                }
        }
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int j = 0; j < GROUP; j++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    out[m][first + j][i] += sum[m][j][i];
    }
}

#endif

// As tile_accumulate, but an element of the tile counts only where p is not 0: what a row does not see does not reach it,
// NaN and inf included. Slow; for tiles that hold such values and are not seen by all rows alike.
template <int COLUMNS, int M, int N, int C>
__device__ __forceinline__ void tile_accumulate_hiding(Real (&out)[M][C][4], Real (&p)[M][N][4], const Stored *tile)
{
    const int lane = lane_index();
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll 1
            for (int k = 0; k < 8 * N; k++) {
                Real mine = 0;
#pragma unroll
                for (int j = 0; j < N; j++)
#pragma unroll
                    for (int e = 0; e < 2; e++)
                        mine = 8 * j + e == (k & ~6) ? p[m][j][2 * h + e] : mine;
                const Real weight = __shfl_sync(0xffffffff, mine, (lane & ~3) | (k & 7) >> 1);
#pragma unroll
                for (int j = 0; j < C; j++) {
                    const Pair b = load_pair<COLUMNS>(tile, k, j);
#pragma unroll
                    for (int e = 0; e < 2; e++)
                        if (weight != 0)
                            out[m][j][2 * h + e] += weight * to_real(b.x[e]);
                }
            }
}

// Whether this thread finds a value in its share of tile[rows][COLUMNS] that is not finite.
template <int COLUMNS, int THREADS> __device__ __forceinline__ bool any_infinite(const Stored *tile, int rows)
{
    bool found = false;
    for (int i = threadIdx.x; i < rows * COLUMNS; i += THREADS) {
        const Real x = to_real(*Tile<Stored, COLUMNS>::at(tile, i / COLUMNS, i % COLUMNS));
        found |= !(x - x == 0);
    }
    return found;
}
