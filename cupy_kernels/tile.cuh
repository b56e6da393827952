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
#include "tile_tensor.cuh"
#else
#include "tile_plain.cuh"
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
