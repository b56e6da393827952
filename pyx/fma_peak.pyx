"""What the processor could do: multiply-adds from register to register. The benchmark's yardstick, nothing else."""

cdef extern from *:
    """
    #include "lanes.h"
    static float mha_fma_rounds(long rounds)
    {
        mha_vector_f32 sum[12], x = v_set_f32(0.999f), y = v_set_f32(0.001f);
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
    """
    float mha_fma_rounds(long rounds) nogil


def fma_rounds(long rounds):
    """Runs `rounds` x 12 float32 vector multiply-adds and returns how many operations that were."""
    cdef float keep
    with nogil:
        keep = mha_fma_rounds(rounds)
    return rounds * 12 * 2 * (MHA_VECTOR_BYTES // 4) + (0 if keep == keep else 1)
