/* The instructions of the processor's matrix tiles (Intel AMX), eight tiles of 16 rows of 64 bytes. They alone know what
 * a tile is: a twin of this file that computes the same on memory makes every kernel run where there are no tiles.
 */
#include <immintrin.h>

/* The compiler does not know that a tile is loaded from memory that the lines before have written. */
#define MHA_TILES_SEE_MEMORY __asm__ volatile("" ::: "memory")

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} mha_tile_shapes;

/* Every tile full, for the calling thread; until then and after the release its tiles do not exist. No Python may run in
 * between: what a signal handler calls may use and release them too. */
MHA_INLINE void mha_tiles_begin(void)
{
    mha_tile_shapes shapes = {.palette = 1};
    for (int t = 0; t < 8; t++) {
        shapes.bytes[t] = 64;
        shapes.rows[t] = 16;
    }
    __asm__ volatile("ldtilecfg %0" ::"m"(shapes));
}
MHA_INLINE void mha_tiles_end(void) { _tile_release(); }

/* `tile` is a literal, strides are bytes. */
#define MHA_TILE_ZERO(tile) _tile_zero(tile)
#define MHA_TILE_LOAD(tile, address, stride) _tile_loadd(tile, address, stride)
#define MHA_TILE_STORE(tile, address, stride) _tile_stored(tile, address, stride)
/* sum[m][n] += left[m][k] . right[k][n], two terms each */
#define MHA_TILE_PAIRS(sum, left, right) _tile_dpbf16ps(sum, left, right)
