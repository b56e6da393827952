// The instructions of cupy_kernels/prim.cuh on a CPU: the same names, as the PTX manual describes them.
#pragma once
#include "cuda.h"

typedef unsigned short uint16;
typedef unsigned int uint32;

#define DYNAMIC_SHARED(name) unsigned char *name = emulator::block->shared
#define KERNEL(threads) extern "C" void

inline float infinity() { return INFINITY; }
inline float exp2_fast(float x) { return exp2f(x); }

UNSEEN inline float from_float16(uint16 x)
{
    _Float16 y;
    memcpy(&y, &x, 2);
    return (float)y;
}
UNSEEN inline uint16 to_float16(float x)
{
    const _Float16 y = (_Float16)x;
    uint16 bits;
    memcpy(&bits, &y, 2);
    return bits;
}
inline float from_bfloat16(uint16 x) { return __uint_as_float((uint32)x << 16); }
inline uint16 to_bfloat16(float x)
{
    const uint32 bits = __float_as_uint(x);
    return x != x ? 0x7fc0 : (uint16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline uint32 pack_float16(float low, float high) { return to_float16(low) | (uint32)to_float16(high) << 16; }
inline uint32 pack_bfloat16(float low, float high) { return to_bfloat16(low) | (uint32)to_bfloat16(high) << 16; }

// Rounds to 10 bits behind the point, halves away from zero.
inline uint32 to_tf32(float x)
{
    const uint32 bits = __float_as_uint(x);
    return (bits & 0x7f800000) == 0x7f800000 ? bits : (bits + 0x1000) & 0xffffe000;
}

inline void copy_async(void *shared, const void *global, int bytes) { emulator::copy_later(shared, global, bytes); }
inline void copy_async_commit() { emulator::commit(); }
template <int PENDING> inline void copy_async_wait() { emulator::wait_for_copies(PENDING); }

typedef const unsigned char *SharedAddress;
inline SharedAddress shared_address(const void *p) { return (SharedAddress)p; }

// Each lane reads its own row, so that a race is seen where the hardware would have it.
template <bool TRANSPOSED> inline void ldmatrix(uint32 (&r)[4], const void *row)
{
    struct Record {
        uint16 row[8];
        uint32 *r;
    } record;
    record.r = r;
    memcpy(record.row, row, 16);
    emulator::exchange<Record>(&record, [](Record **x) UNSEEN {
        for (int lane = 0; lane < 32; lane++)
            for (int matrix = 0; matrix < 4; matrix++) {
                const int i = lane / 4, j = 2 * (lane % 4);
                Record **rows = x + 8 * matrix;
                const uint16 low = TRANSPOSED ? rows[j]->row[i] : rows[i]->row[j];
                const uint16 high = TRANSPOSED ? rows[j + 1]->row[i] : rows[i]->row[j + 1];
                x[lane]->r[matrix] = low | (uint32)high << 16;
            }
    });
}
inline void ldmatrix_x4(uint32 (&r)[4], SharedAddress row) { ldmatrix<false>(r, row); }
inline void ldmatrix_x4_trans(uint32 (&r)[4], SharedAddress row) { ldmatrix<true>(r, row); }

struct Mma16 {
    float *c;
    const uint32 *a;
    uint32 b[2];
};
template <float (*CONVERT)(uint16)> UNSEEN inline void mma_16(Mma16 **x)
{
    float a[16][16], b[8][16];
    for (int lane = 0; lane < 32; lane++) {
        const int g = lane / 4, t = lane % 4;
        for (int h = 0; h < 2; h++) {
            for (int i = 0; i < 4; i++)
                a[g + 8 * (i & 1)][2 * t + 8 * (i >> 1) + h] = CONVERT((uint16)(x[lane]->a[i] >> 16 * h));
            for (int i = 0; i < 2; i++)
                b[g][2 * t + 8 * i + h] = CONVERT((uint16)(x[lane]->b[i] >> 16 * h));
        }
    }
    for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < 4; i++) {
            const float *left = a[lane / 4 + 8 * (i >> 1)], *right = b[2 * (lane % 4) + (i & 1)];
            float sum = 0;
            for (int k = 0; k < 16; k++)
                sum += left[k] * right[k];
            x[lane]->c[i] += sum;
        }
}
inline void mma_float16(float (&c)[4], const uint32 (&a)[4], uint32 b0, uint32 b1)
{
    Mma16 record{c, a, {b0, b1}};
    emulator::exchange<Mma16>(&record, mma_16<from_float16>);
}
inline void mma_bfloat16(float (&c)[4], const uint32 (&a)[4], uint32 b0, uint32 b1)
{
    Mma16 record{c, a, {b0, b1}};
    emulator::exchange<Mma16>(&record, mma_16<from_bfloat16>);
}

inline void mma_tf32(float (&c)[4], const uint32 (&a)[4], uint32 b0, uint32 b1)
{
    Mma16 record{c, a, {b0, b1}};
    emulator::exchange<Mma16>(&record, [](Mma16 **x) UNSEEN {
        float a[16][8], b[8][8];
        for (int lane = 0; lane < 32; lane++) {
            const int g = lane / 4, t = lane % 4;
            for (int i = 0; i < 4; i++)
                a[g + 8 * (i & 1)][t + 4 * (i >> 1)] = __uint_as_float(x[lane]->a[i] & 0xffffe000);
            for (int i = 0; i < 2; i++)
                b[g][t + 4 * i] = __uint_as_float(x[lane]->b[i] & 0xffffe000);
        }
        for (int lane = 0; lane < 32; lane++)
            for (int i = 0; i < 4; i++) {
                const float *left = a[lane / 4 + 8 * (i >> 1)], *right = b[2 * (lane % 4) + (i & 1)];
                float sum = 0;
                for (int k = 0; k < 8; k++)
                    sum += left[k] * right[k];
                x[lane]->c[i] += sum;
            }
    });
}

inline void mma_float64(double &c0, double &c1, double a, double b)
{
    struct Record {
        double *c[2], a, b;
    } record{{&c0, &c1}, a, b};
    emulator::exchange<Record>(&record, [](Record **x) UNSEEN {
        for (int lane = 0; lane < 32; lane++)
            for (int i = 0; i < 2; i++) {
                double sum = *x[lane]->c[i];
                for (int k = 0; k < 4; k++)
                    sum = fma(x[lane / 4 * 4 + k]->a, x[4 * (2 * (lane % 4) + i) + k]->b, sum);
                *x[lane]->c[i] = sum;
            }
    });
}
