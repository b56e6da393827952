// One wrapper for each instruction that CUDA C++ has no word for. All inline PTX of the package is here, so that
// everything above it is plain C++.
#pragma once

typedef unsigned short uint16;
typedef unsigned int uint32;

#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
// One block of threads a multiprocessor is enough: without the 1 the compiler spills to make room for three.
#define KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads, 1)

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }

__device__ __forceinline__ float exp2_fast(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float from_float16(uint16 x)
{
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}

__device__ __forceinline__ uint16 to_float16(float x)
{
    uint16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float from_bfloat16(uint16 x) { return __uint_as_float((uint32)x << 16); }

__device__ __forceinline__ uint16 to_bfloat16(float x)
{
    const uint32 bits = __float_as_uint(x);
    return x != x ? 0x7fc0 : (uint16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Addresses within shared memory take one register, pointers two.
typedef uint32 SharedAddress;
__device__ __forceinline__ SharedAddress shared_address(const void *p) { return (uint32)__cvta_generic_to_shared(p); }

#if __CUDA_ARCH__ >= 800

__device__ __forceinline__ uint32 pack_float16(float low, float high)
{
    uint32 y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}

__device__ __forceinline__ uint32 pack_bfloat16(float low, float high)
{
    uint32 y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}

// The bits of a float rounded to tf32.
__device__ __forceinline__ uint32 to_tf32(float x)
{
    uint32 y;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
    return y;
}

// 16 bytes from global to shared memory; of them only the first `bytes` are read, the others are zeros.
__device__ __forceinline__ void copy_async(void *shared, const void *global, int bytes)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most PENDING of this thread's groups are under way.
template <int PENDING> __device__ __forceinline__ void copy_async_wait()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements (rows of 16 bytes); lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void ldmatrix_x4(uint32 (&r)[4], SharedAddress row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32 (&r)[4], SharedAddress row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
}

// c (16 x 8) += a (16 x 16) b (16 x 8)
__device__ __forceinline__ void mma_float16(float (&c)[4], const uint32 (&a)[4], uint32 b0, uint32 b1)
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma_bfloat16(float (&c)[4], const uint32 (&a)[4], uint32 b0, uint32 b1)
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// c (16 x 8) += a (16 x 8) b (8 x 8), the operands tf32
__device__ __forceinline__ void mma_tf32(float (&c)[4], const uint32 (&a)[4], uint32 b0, uint32 b1)
{
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// c (8 x 8) += a (8 x 4) b (4 x 8)
__device__ __forceinline__ void mma_float64(double &c0, double &c1, double a, double b)
{
    asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
                 : "+d"(c0), "+d"(c1)
                 : "d"(a), "d"(b));
}

#else // before sm_80 there are no asynchronous copies, and the matrix units take float16 alone: nothing here uses them

__device__ __forceinline__ void copy_async(void *shared, const void *global, int bytes)
{
    uint4 x = make_uint4(0, 0, 0, 0);
    if (bytes > 0)
        x = *(const uint4 *)global;
    *(uint4 *)shared = x;
}

__device__ __forceinline__ void copy_async_commit() {}

template <int PENDING> __device__ __forceinline__ void copy_async_wait() {}

#endif
