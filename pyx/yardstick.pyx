"""What the machine could do: multiply-adds from register to register, and reading memory. The benchmark's yardsticks,
nothing else."""
from cython.parallel cimport parallel, threadid

cdef extern from *:
    """
    #include "lanes.h"
    static float mha_fma_rounds(long rounds)
    {
        /* Known to the compiler, 1 * 0.999 + 0.001 = 1 would be computed once. */
        const volatile float factor = 0.999f, term = 0.001f;
        mha_vector_f32 sum[12], x = v_set_f32(factor), y = v_set_f32(term);
    #pragma GCC unroll 12
        for (int i = 0; i < 12; i++)
            sum[i] = v_set_f32((float)i);
        for (long r = 0; r < rounds; r++)
    #pragma GCC unroll 12
            for (int i = 0; i < 12; i++)
                sum[i] = sum[i] * x + y;
    #pragma GCC unroll 12
        for (int i = 1; i < 12; i++)
            sum[0] += sum[i];
        return sum[0][0];
    }
    static void mha_read(const float *x, ptrdiff_t count)
    {
        mha_vector_f32 sum[8] = {{0}};
        for (ptrdiff_t i = 0; i + 8 * mha_lanes_f32 <= count; i += 8 * mha_lanes_f32)
    #pragma GCC unroll 8
            for (int j = 0; j < 8; j++)
                sum[j] += v_load_f32(x + i + j * mha_lanes_f32);
        for (int j = 1; j < 8; j++)
            sum[0] += sum[j];
        __asm__ volatile("" : : "m"(sum[0])); /* what nobody uses the compiler would not read */
    }
    """
    float mha_fma_rounds(long rounds) nogil
    void mha_read(const float* x, Py_ssize_t count) nogil


def fma_rounds(long rounds):
    """Runs `rounds` x 12 float32 vector multiply-adds and returns how many operations that were."""
    cdef float keep
    with nogil:
        keep = mha_fma_rounds(rounds)
    return rounds * 12 * 2 * (MHA_VECTOR_BYTES // 4) + (0 if keep == keep else 1)


def read_all(const float[::1] x, int threads):
    """Reads the whole array, each thread its own part, and returns the bytes read."""
    cdef Py_ssize_t part = x.shape[0] // threads
    cdef const float* start = &x[0]
    with nogil, parallel(num_threads=threads):
        mha_read(start + threadid() * part, part)
    return 4 * part * threads
