// The two products by plain multiplications and additions: exact float32, and whatever has no matrix instructions.
// Included by tile.cuh, which says how the results lie.
#pragma once

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
