/* Matrix tiles in memory, for processors that have none: the twin of pyx/amx_instructions.h. Outside of begin and end,
 * where hardware would fault, every value is a NaN.
 */
static _Thread_local struct {
    int begun;
    uint32_t tile[8][16][16];
} mha_amx;

#define MHA_TILES_SEE_MEMORY

MHA_INLINE void mha_tiles_begin(void)
{
    memset(&mha_amx, 0, sizeof mha_amx);
    mha_amx.begun = 1;
}
MHA_INLINE void mha_tiles_end(void)
{
    mha_amx.begun = 0;
    memset(mha_amx.tile, 0xff, sizeof mha_amx.tile);
}
MHA_INLINE void MHA_TILE_ZERO(int tile) { memset(mha_amx.tile[tile], mha_amx.begun ? 0 : 0xff, 1024); }
MHA_INLINE void MHA_TILE_LOAD(int tile, const void *address, ptrdiff_t stride)
{
    for (int i = 0; i < 16 && mha_amx.begun; i++)
        memcpy(mha_amx.tile[tile][i], (const char *)address + i * stride, 64);
}
MHA_INLINE void MHA_TILE_STORE(int tile, void *address, ptrdiff_t stride)
{
    for (int i = 0; i < 16; i++)
        memcpy((char *)address + i * stride, mha_amx.tile[tile][i], 64);
}

/* Subnormals are 0 to the instruction, and what it gives. */
MHA_INLINE float mha_flushed(float x) { return fabsf(x) < 0x1p-126f ? 0 : x; }

MHA_FUNCTION void MHA_TILE_PAIRS(int sum, int left, int right)
{
    for (int m = 0; m < 16; m++)
        for (int n = 0; n < 16; n++) {
            float even = 0, odd = 0, total;
            for (int k = 0; k < 16 && mha_amx.begun; k++) {
                const uint32_t a = mha_amx.tile[left][m][k], b = mha_amx.tile[right][k][n];
                even += mha_flushed(mha_bits_to_float(a << 16)) * mha_flushed(mha_bits_to_float(b << 16));
                odd += mha_flushed(mha_bits_to_float(a & 0xffff0000)) * mha_flushed(mha_bits_to_float(b & 0xffff0000));
            }
            memcpy(&total, &mha_amx.tile[sum][m][n], 4);
            total = mha_flushed(total + (even + odd));
            memcpy(&mha_amx.tile[sum][m][n], &total, 4);
        }
}
