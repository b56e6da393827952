/* Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
 * The dropout mask is a function of (seed, offset, sample and head, query, key) alone: counter
 * (key >> 3, query, sample * heads + head, offset) gives 8 keys, 16 bits each, key j in half j & 1 of word (j & 7) >> 1.
 */
MHA_INLINE void mha_philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1, uint32_t *w0,
                           uint32_t *w1, uint32_t *w2, uint32_t *w3)
{
#pragma GCC unroll 10
    for (int round = 0; round < 10; round++) {
        const uint64_t p0 = (uint64_t)0xD2511F53u * c0;
        const uint64_t p1 = (uint64_t)0xCD9E8D57u * c2;
        c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
        c1 = (uint32_t)p1;
        c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c3 = (uint32_t)p0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    *w0 = c0;
    *w1 = c1;
    *w2 = c2;
    *w3 = c3;
}

/* words[w * count + r] for the 8 keys of `group`, for `count` rows with their own query index and sample-head index. */
MHA_FUNCTION void mha_philox_rows(ptrdiff_t count, uint32_t group, const uint32_t *restrict query,
                                  const uint32_t *restrict sample_head, uint32_t offset, uint32_t k0, uint32_t k1,
                                  uint32_t *restrict words)
{
    for (ptrdiff_t r = 0; r < count; r++)
        mha_philox(group, query[r], sample_head[r], offset, k0, k1, words + r, words + count + r, words + 2 * count + r,
                   words + 3 * count + r);
}

/* words[w * count + g] for `count` groups from `first` on: the draws of one row of an output, counter (e >> 3, c1, c2). */
MHA_FUNCTION void mha_philox_groups(ptrdiff_t count, uint32_t first, uint32_t c1, uint32_t c2, uint32_t offset,
                                    uint32_t k0, uint32_t k1, uint32_t *restrict words)
{
    for (ptrdiff_t g = 0; g < count; g++)
        mha_philox(first + (uint32_t)g, c1, c2, offset, k0, k1, words + g, words + count + g, words + 2 * count + g,
                   words + 3 * count + g);
}
