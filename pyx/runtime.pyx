"""What does not depend on the instruction set: the OpenMP runtime, and which levels this processor can run."""

cdef extern from *:
    """
    #ifdef _OPENMP
    #include <omp.h>
    #define MHA_OPENMP _OPENMP
    static int mha_max_threads(void) { return omp_in_parallel() ? 1 : omp_get_max_threads(); }
    static void mha_release_pool(void) { omp_pause_resource_all(omp_pause_hard); }
    #else
    #define MHA_OPENMP 0
    static int mha_max_threads(void) { return 1; }
    static void mha_release_pool(void) {}
    #endif
    #if defined(__x86_64__) || defined(__i386__)
    #include <cpuid.h>
    static int mha_has_avx2(void)
    {
        __builtin_cpu_init();
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    }
    static int mha_has_avx512(void)
    {
        return mha_has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512cd");
    }
    static int mha_has_avx512bf16(void) { return mha_has_avx512() && __builtin_cpu_supports("avx512bf16"); }
    #else
    static int mha_has_avx2(void) { return 0; }
    static int mha_has_avx512(void) { return 0; }
    static int mha_has_avx512bf16(void) { return 0; }
    #endif
    #if defined(__x86_64__) && defined(__linux__)
    #include <sys/syscall.h>
    #include <unistd.h>
    /* Linux gives the memory for a thread's matrix tiles to a process that asks for them, once for all its threads. */
    static int mha_has_amx(void)
    {
        enum { BFLOAT16 = 1 << 22, TILES = 1 << 24, ASK_FOR_STATE = 0x1023, STATE_OF_TILES = 18 };
        unsigned a, b, c, d = 0;
        return mha_has_avx512bf16() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & BFLOAT16) && (d & TILES) &&
               syscall(SYS_arch_prctl, ASK_FOR_STATE, STATE_OF_TILES) == 0;
    }
    #else
    static int mha_has_amx(void) { return 0; }
    #endif
    """
    int MHA_OPENMP
    int mha_max_threads() nogil
    void mha_release_pool() nogil
    int mha_has_avx2() nogil
    int mha_has_avx512() nogil
    int mha_has_avx512bf16() nogil
    int mha_has_amx() nogil

#: The date of the OpenMP specification the build follows, e.g. 201511; 0 in a serial build.
OPENMP = MHA_OPENMP


def max_threads():
    """What OpenMP would use now on this thread; 1 inside a parallel region and in a serial build."""
    return mha_max_threads()


def release_pool():
    """Ends this thread's pool of OpenMP threads; the next region starts a new one. For use before a fork."""
    mha_release_pool()


def runs(str level):
    """Whether this processor and operating system can run the instruction-set level."""
    if level == "avx2":
        return bool(mha_has_avx2())
    if level == "avx512":
        return bool(mha_has_avx512())
    if level == "avx512bf16":
        return bool(mha_has_avx512bf16())
    if level == "amx":
        return bool(mha_has_amx())
    return level == "baseline"
