// The types and sizes of one specialisation. The plan (mha/gpu/plan.py) decides all of them and passes them as macros.
#pragma once
#include "params.cuh"
#include "prim.cuh"

enum Storage { FLOAT32, FLOAT64, FLOAT16, BFLOAT16, BOOL };

constexpr int STORAGE = MHA_STORAGE;
constexpr bool NARROW = STORAGE == FLOAT16 || STORAGE == BFLOAT16;

template <int storage> struct Types {
    typedef float Real;
    typedef uint16 Stored;
};
template <> struct Types<FLOAT32> {
    typedef float Real;
    typedef float Stored;
};
template <> struct Types<FLOAT64> {
    typedef double Real;
    typedef double Stored;
};
typedef Types<STORAGE>::Real Real;     // what is computed in
typedef Types<STORAGE>::Stored Stored; // what lies in memory, shared memory included

__device__ __forceinline__ float to_real(float x) { return x; }
__device__ __forceinline__ double to_real(double x) { return x; }
__device__ __forceinline__ float to_real(uint16 x) { return STORAGE == BFLOAT16 ? from_bfloat16(x) : from_float16(x); }

__device__ __forceinline__ void to_stored(float &out, float x) { out = x; }
__device__ __forceinline__ void to_stored(double &out, double x) { out = x; }
__device__ __forceinline__ void to_stored(uint16 &out, float x)
{
    out = STORAGE == BFLOAT16 ? to_bfloat16(x) : to_float16(x);
}

constexpr int CHUNK = 16 / sizeof(Stored); // elements of the widest copy

__device__ __forceinline__ int lane_index() { return threadIdx.x & 31; }
__device__ __forceinline__ int warp_index() { return threadIdx.x >> 5; }

// What the launch gives a block of threads.
__device__ __forceinline__ unsigned char *shared_memory()
{
    DYNAMIC_SHARED(memory);
    return memory;
}

// The next `bytes` of shared memory, which must be a multiple of 16.
__device__ __forceinline__ unsigned char *carve(unsigned char *&cursor, int bytes)
{
    unsigned char *start = cursor;
    cursor += bytes;
    return start;
}
