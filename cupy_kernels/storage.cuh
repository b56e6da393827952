// Between global memory, in whatever type and strides the user keeps it, and tiles in shared memory.
#pragma once
#include "lanes.cuh"
#include "tile.cuh"

// One element of any type; masks have their own.
__device__ __forceinline__ Real load_one(int64 storage, const void *data, int64 index)
{
    switch (storage) {
    case FLOAT32:
        return (Real)((const float *)data)[index];
    case FLOAT64:
        return (Real)((const double *)data)[index];
    case FLOAT16:
        return (Real)from_float16(((const uint16 *)data)[index]);
    case BFLOAT16:
        return (Real)from_bfloat16(((const uint16 *)data)[index]);
    default:
        return (Real)((const unsigned char *)data)[index];
    }
}

__device__ __forceinline__ void store_one(int64 storage, void *data, int64 index, Real value)
{
    switch (storage) {
    case FLOAT32:
        ((float *)data)[index] = (float)value;
        break;
    case FLOAT64:
        ((double *)data)[index] = (double)value;
        break;
    case FLOAT16:
        ((uint16 *)data)[index] = to_float16((float)value);
        break;
    default:
        ((uint16 *)data)[index] = to_bfloat16((float)value);
    }
}

// Where row `i` of head `h` of sample `n` starts, in elements.
__device__ __forceinline__ int64 element(const TensorView &x, int64 n, int64 h, int64 i)
{
    return (x.offsets ? x.offsets[n] : n * x.batch) + h * x.head + i * x.row;
}

// tile[count][COLUMNS] = rows of x, of which row r starts at element `start(r)` or, where that is negative, is zeros
// and never read; so are the columns from `columns` on. With ALIGNED the copies are asynchronous: commit and wait.
template <bool ALIGNED, int COLUMNS, int THREADS, class Start>
__device__ __forceinline__ void load_rows(Stored *tile, int count, const TensorView &x, int columns, Start start)
{
    typedef Tile<Stored, COLUMNS> Rows;
    const Stored *data = (const Stored *)x.data;
    if (ALIGNED) {
        constexpr int CHUNKS = COLUMNS / CHUNK;
#pragma unroll 2
        for (int i = threadIdx.x; i < count * CHUNKS; i += THREADS) {
            const int r = i / CHUNKS, c = i % CHUNKS;
            const int64 from = start(r);
            const bool there = from >= 0 && c * CHUNK < columns;
            copy_async(Rows::chunk(tile, r, c), data + (there ? from + c * CHUNK : 0), there ? 16 : 0);
        }
    } else {
        for (int i = threadIdx.x; i < count * COLUMNS; i += THREADS) {
            const int r = i / COLUMNS, c = i % COLUMNS;
            const int64 from = start(r);
            Stored value = 0;
            if (from >= 0 && c < columns)
                value = data[from + c * x.column];
            *Rows::at(tile, r, c) = value;
        }
    }
}

// Row `from` of x, columns `column` and the next, as far as there are `columns`.
__device__ __forceinline__ void store_two(const TensorView &x, int64 from, int column, int columns, Real a, Real b)
{
    Stored *data = (Stored *)x.data + from + column * x.column;
    Stored pair[2];
    to_stored(pair[0], a);
    to_stored(pair[1], b);
    if (column + 1 < columns && x.column == 1 && (size_t)data % (2 * sizeof(Stored)) == 0) {
        struct __align__(2 * sizeof(Stored)) Pair {
            Stored x[2];
        };
        Pair both;
        both.x[0] = pair[0];
        both.x[1] = pair[1];
        *(Pair *)data = both;
        return;
    }
    if (column < columns)
        data[0] = pair[0];
    if (column + 1 < columns)
        data[x.column] = pair[1];
}
