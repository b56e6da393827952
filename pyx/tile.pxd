"""What the C headers offer. Pointers that are `void*` here are `float*` or `double*`: the header picks the function
by the pointer's type, and the C compiler checks the others against it.
"""
from libc.stdint cimport int64_t, uint16_t, uint32_t

ctypedef fused real:
    float
    double

cdef enum:
    MOST_LANES = 64                 # of a panel of the tiles: four of the widest vectors

cdef extern from "lanes.h" nogil:
    int MHA_VECTOR_BYTES
    int MHA_TILE_VECTORS
    int MHA_FLOAT32
    int MHA_FLOAT64
    int MHA_FLOAT16
    int MHA_BFLOAT16
    int MHA_BOOL

    # pairs.h
    int MHA_PAIRED
    int MHA_TILED
    void mha_tiles_begin()
    void mha_tiles_end()
    void pair_product(Py_ssize_t rows, Py_ssize_t vectors, Py_ssize_t k, const uint16_t* a, Py_ssize_t a_row,
                      Py_ssize_t a_k, const float* b, Py_ssize_t ldb, float* c, Py_ssize_t ldc, int accumulate)
    void turn_pairs(Py_ssize_t pairs, Py_ssize_t columns, const uint32_t* x, uint32_t* out, Py_ssize_t out_row)
    void pair_rows(Py_ssize_t rows, Py_ssize_t width, const float* x, float* out)
    void pair_values(Py_ssize_t count, const uint16_t* even, const uint16_t* odd, Py_ssize_t stride, uint32_t* out)
    int pairs_finite(const uint16_t* x, Py_ssize_t count)
    # tile.h
    void tile_product(Py_ssize_t rows, Py_ssize_t vectors, Py_ssize_t k, const void* a, Py_ssize_t a_row,
                      Py_ssize_t a_k, const void* b, Py_ssize_t ldb, void* c, Py_ssize_t ldc, int accumulate)
    # dots.h
    void tile_product_hiding(Py_ssize_t rows, Py_ssize_t vectors, Py_ssize_t k, const void* a, Py_ssize_t a_row,
                             Py_ssize_t a_k, const void* b, Py_ssize_t ldb, void* c, Py_ssize_t ldc,
                             int b_is_probability)
    void tile_lane_dots(Py_ssize_t columns, Py_ssize_t vectors, const void* x, const void* y, void* out)
    # stream.h
    void tile_dots(Py_ssize_t count, Py_ssize_t columns, const void* key, Py_ssize_t key_row, Py_ssize_t rows,
                   const void* x, void* out, Py_ssize_t ldo, const void* next)
    void tile_values(Py_ssize_t vectors, Py_ssize_t count, const void* value, Py_ssize_t value_row, Py_ssize_t rows,
                     const void* weight, Py_ssize_t weight_row, void* out, const void* next)
    # online_softmax.h
    double softmax_absorb_row(Py_ssize_t vectors, void* s, double scale, void* maximum, void* sum)
    float exp_one_f32(float x)
    double exp_one_f64(double x)
    int softmax_absorb(Py_ssize_t keys, Py_ssize_t vectors, void* s, double scale, void* maximum, void* sum,
                       void* rescale)
    void scale_lanes(Py_ssize_t rows, Py_ssize_t vectors, void* x, const void* factor)
    void softmax_replay(Py_ssize_t keys, Py_ssize_t vectors, void* s, double scale, const void* shift,
                        const void* row_scale)
    void softmax_replay_row(Py_ssize_t vectors, void* s, double scale, double shift, double row_scale)
    void softmax_gradient(Py_ssize_t rows, Py_ssize_t vectors, const void* p, void* dp, const void* delta,
                          int delta_is_per_row)
    # mask.h
    void scale_scores(Py_ssize_t vectors, void* s, double scale)
    void softcap_scores(Py_ssize_t vectors, void* s, double cap, void* slope)
    void softcap_gradient(Py_ssize_t vectors, void* ds, const void* slope)
    void add_bias(Py_ssize_t vectors, void* s, const void* bias, int one_for_the_row)
    void hide_flagged(Py_ssize_t vectors, void* s, const void* flag, double hides)
    void hide_key(Py_ssize_t vectors, void* s, double j, const void* low, const void* high)
    void hide_lanes(Py_ssize_t width, void* s, Py_ssize_t low, Py_ssize_t high)
    void drop_lanes(Py_ssize_t width, void* x, const uint32_t* word, int shift, uint32_t threshold, double factor)
    void drop_factors(Py_ssize_t count, void* factor, int64_t key, const uint32_t* words, Py_ssize_t stride,
                      uint32_t threshold, double kept)
    void multiply(Py_ssize_t count, void* out, const void* x, const void* y)
    # storage.h
    void load_vector(int storage, const void* base, Py_ssize_t start, Py_ssize_t stride, Py_ssize_t count, void* out,
                     Py_ssize_t out_stride)
    void store_vector(int storage, void* base, Py_ssize_t start, Py_ssize_t stride, Py_ssize_t count,
                      const void* value, Py_ssize_t value_stride, double factor)
    int64_t MHA_NOWHERE
    void load_transposed(int storage, const void* base, const int64_t* starts, Py_ssize_t stride, Py_ssize_t rows,
                         Py_ssize_t columns, void* out, Py_ssize_t width)
    void store_transposed(int storage, void* base, const int64_t* starts, Py_ssize_t stride, Py_ssize_t rows,
                          Py_ssize_t columns, const void* value, Py_ssize_t width, double factor)
    int all_finite(const void* x, Py_ssize_t rows, Py_ssize_t row, Py_ssize_t columns, Py_ssize_t column)
    # norm.h
    double normalise_row(Py_ssize_t count, void* x, double epsilon)
    void normalise_row_gradient(Py_ssize_t count, const void* x, void* g, double factor)
    # philox.h
    void mha_philox_groups(Py_ssize_t count, uint32_t first, uint32_t c1, uint32_t c2, uint32_t offset, uint32_t k0,
                           uint32_t k1, uint32_t* words)
    void mha_philox_rows(Py_ssize_t count, uint32_t group, const uint32_t* query, const uint32_t* sample_head,
                         uint32_t offset, uint32_t k0, uint32_t k1, uint32_t* words)


cdef inline Py_ssize_t lanes(const real* kind) noexcept nogil:
    return MHA_VECTOR_BYTES // sizeof(real)


cdef inline real exp_one(real x) noexcept nogil:
    if real is float:
        return exp_one_f32(x)
    else:
        return exp_one_f64(x)
