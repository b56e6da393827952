// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011): the same bits as
// pyx/philox.h and mha/random.py.
#pragma once
#include "prim.cuh"

__device__ __forceinline__ void philox(uint32 c0, uint32 c1, uint32 c2, uint32 c3, uint32 k0, uint32 k1,
                                       uint32 (&words)[4])
{
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const unsigned long long p0 = 0xD2511F53ull * c0, p1 = 0xCD9E8D57ull * c2;
        c0 = (uint32)(p1 >> 32) ^ c1 ^ k0;
        c1 = (uint32)p1;
        c2 = (uint32)(p0 >> 32) ^ c3 ^ k1;
        c3 = (uint32)p0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    words[0] = c0;
    words[1] = c1;
    words[2] = c2;
    words[3] = c3;
}

// Bit j: whether element j of the group of eight stays; its draw is half j & 1 of word j >> 1.
__device__ __forceinline__ uint32 keep_bits(const uint32 (&words)[4], uint32 threshold)
{
    uint32 bits = 0;
#pragma unroll
    for (int j = 0; j < 8; j++)
        bits |= (uint32)((words[j >> 1] >> (16 * (j & 1)) & 0xffff) >= threshold) << j;
    return bits;
}
