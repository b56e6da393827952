"""delta = rowsum(grad_output * output), the row term of the softmax backward."""
from cython.parallel cimport parallel, threadid
from libc.stdint cimport int64_t
from params cimport AttentionParams, TensorView, checked_params
from tile cimport real, lanes, load_transposed, tile_lane_dots, MHA_VECTOR_BYTES, MOST_LANES
from storage cimport element
from schedule cimport mha_schedule, schedule_start, next_item, finished, carve


cdef enum:
    DELTA_VECTORS = 4


cdef void load_queries(const TensorView* x, Py_ssize_t n, Py_ssize_t head, int64_t first, int64_t count,
                       Py_ssize_t columns, real* out, Py_ssize_t width) noexcept nogil:
    """out[columns][lanes are queries]"""
    cdef int64_t starts[MOST_LANES]
    cdef int64_t q
    for q in range(count):
        starts[q] = element(x, n, head, first + q)
    load_transposed(<int>x.storage, x.data, starts, x.column, count, columns, out, width)


cdef void delta_rows(const AttentionParams* p, Py_ssize_t n, Py_ssize_t head, char* base,
                     const real* kind) noexcept nogil:
    """One head, lanes are its queries."""
    cdef char* cursor = base
    cdef Py_ssize_t width = DELTA_VECTORS * lanes(kind), size = p.v_head_dim * width * sizeof(real)
    cdef real* output = <real*>carve(&cursor, size)
    cdef real* grad = <real*>carve(&cursor, size)
    cdef real* sum = <real*>carve(&cursor, width * sizeof(real))
    cdef real* delta = <real*>p.delta + (n * p.heads + head) * p.queries
    cdef int64_t first = 0, count, q
    while first < p.queries:
        count = min(width, p.queries - first)
        load_queries(&p.output, n, head, first, count, p.v_head_dim, output, width)
        load_queries(&p.grad_output, n, head, first, count, p.v_head_dim, grad, width)
        tile_lane_dots(p.v_head_dim, DELTA_VECTORS, output, grad, sum)
        for q in range(count):
            delta[first + q] = sum[q]
        first += count


cdef void delta_worker(const AttentionParams* p, mha_schedule* schedule, int thread, const real* kind) noexcept nogil:
    cdef int64_t item
    item = next_item(schedule, thread, -1)
    while item >= 0:
        delta_rows(p, item // p.heads, item % p.heads, p.scratch + thread * p.scratch_bytes, kind)
        item = next_item(schedule, thread, item)


cdef int run_delta(const AttentionParams* p, const real* kind) except -1:
    cdef mha_schedule schedule
    schedule_start(&schedule, p.batch * p.heads, <int>p.main_thread)
    with nogil, parallel(num_threads=<int>p.threads):
        delta_worker(p, &schedule, threadid(), kind)
    return finished(&schedule)


def attention_delta_scratch(const unsigned char[::1] params, bint double_precision):
    """Bytes of scratch memory that one thread needs."""
    cdef char* cursor = NULL
    cdef const AttentionParams* p = checked_params(params)
    carve(&cursor, p.v_head_dim * DELTA_VECTORS * MHA_VECTOR_BYTES)
    carve(&cursor, p.v_head_dim * DELTA_VECTORS * MHA_VECTOR_BYTES)
    carve(&cursor, DELTA_VECTORS * MHA_VECTOR_BYTES)
    return <Py_ssize_t>cursor


def attention_delta(const unsigned char[::1] params, bint double_precision):
    """Writes delta; returns the size of the team of threads."""
    cdef const AttentionParams* p = checked_params(params)
    if double_precision:
        return run_delta(p, <const double*>NULL)
    return run_delta(p, <const float*>NULL)
