// The part of CUDA C++ that the kernels use, on a CPU: the same source, compiled by a C++ compiler.
//
// Every CUDA thread is a fibre; the fibres of a block run on one thread of the operating system, in a random order if a
// seed asks for it, and give way to each other only where they wait. So "static thread_local" is shared memory. What
// the hardware does behind a program's back happens as late as the program permits: an asynchronous copy lands at the wait
// that covers it, and until then its target holds NaN.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__SANITIZE_THREAD__)
#define UNSEEN __attribute__((no_sanitize("thread")))
#else
#define UNSEEN
#endif

#define __device__
#define __global__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __shared__ static thread_local
#define __align__(n) __attribute__((aligned(n)))

struct dim3 {
    unsigned x, y, z;
};

namespace emulator
{
struct Fibre {
    dim3 thread;
    int index;
};
struct Block {
    dim3 grid, size, index;
    int threads;
    unsigned char *shared;
};
extern thread_local Fibre *fibre;
extern thread_local Block *block;

void barrier(int predicate, int *any);              // all threads of the block
void *meet(void *record, void (*operate)(void **)); // all 32 lanes; the last to come runs operate(records of the lanes)
void warp_barrier();
void copy_later(void *to, const void *from, int bytes); // 16 bytes of which `bytes` are read
void commit();
void wait_for_copies(int pending);

// All lanes of a warp exchange records. Like the device's, this orders no memory: `operate` must touch only the records.
template <class Record> inline void exchange(Record *record, void (*operate)(Record **))
{
    meet(record, (void (*)(void **))operate);
}
} // namespace emulator

#define threadIdx (emulator::fibre->thread)
#define blockIdx (emulator::block->index)
#define blockDim (emulator::block->size)
#define gridDim (emulator::block->grid)

using std::exp;
using std::log;
using std::sqrt;
using std::tanh;
template <class T> inline T min(T a, T b) { return b < a ? b : a; }
template <class T> inline T max(T a, T b) { return a < b ? b : a; }

inline uint32_t __float_as_uint(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}
inline float __uint_as_float(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

inline int atomicMin(int *x, int value)
{
    int old = __atomic_load_n(x, __ATOMIC_RELAXED);
    while (value < old && !__atomic_compare_exchange_n(x, &old, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
    return old;
}
inline int atomicMax(int *x, int value)
{
    int old = __atomic_load_n(x, __ATOMIC_RELAXED);
    while (value > old && !__atomic_compare_exchange_n(x, &old, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
    return old;
}

inline void __syncthreads()
{
    int any;
    emulator::barrier(0, &any);
}
inline int __syncthreads_or(int predicate)
{
    int any;
    emulator::barrier(predicate, &any);
    return any;
}
inline void __syncwarp(unsigned = 0xffffffff) { emulator::warp_barrier(); }

template <class T> inline T __shfl_sync(unsigned, T value, int lane)
{
    struct Record {
        T in, out;
        int lane;
    } record{value, value, lane & 31};
    emulator::exchange<Record>(&record, [](Record **x) UNSEEN {
        for (int l = 0; l < 32; l++)
            x[l]->out = x[x[l]->lane]->in;
    });
    return record.out;
}
template <class T> inline T __shfl_xor_sync(unsigned mask, T value, int other)
{
    return __shfl_sync(mask, value, (threadIdx.x & 31) ^ other);
}
inline int __any_sync(unsigned, int predicate)
{
    struct Record {
        int in, out;
    } record{predicate != 0, 0};
    emulator::exchange<Record>(&record, [](Record **x) UNSEEN {
        int any = 0;
        for (int l = 0; l < 32; l++)
            any |= x[l]->in;
        for (int l = 0; l < 32; l++)
            x[l]->out = any;
    });
    return record.out;
}
