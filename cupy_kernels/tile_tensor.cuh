// The two products by matrix instructions: float16 and bfloat16, float64, and float32 by three products of tf32 parts.
// Included by tile.cuh, which says how the results lie.
#pragma once

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
