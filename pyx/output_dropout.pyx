"""Dropout of the layer's output and the residual link, in one pass over (N, L, E).

The parameter block of the attention kernels is reused: `query` is the input, `key` the residual (data NULL: none),
`output` the result; batch, queries and head_dim are N, L and E.
"""
from cython.parallel cimport parallel, threadid
from libc.stdint cimport int64_t, uint32_t
from params cimport AttentionParams, checked_params
from tile cimport real, load_vector, store_vector, mha_philox_groups
from storage cimport element
from schedule cimport mha_schedule, schedule_start, next_item, finished, carve


cdef void dropout_row(const AttentionParams* p, Py_ssize_t n, int64_t i, char* base, const real* kind) noexcept nogil:
    cdef int64_t size = p.head_dim, groups = (size + 7) // 8, e
    cdef char* cursor = base
    cdef real* x = <real*>carve(&cursor, size * sizeof(real))
    cdef real* residual = <real*>carve(&cursor, size * sizeof(real))
    cdef uint32_t* words = <uint32_t*>carve(&cursor, groups * 16)
    cdef uint32_t half
    load_vector(<int>p.query.storage, p.query.data, element(&p.query, n, 0, i), p.query.column, size, x, 1)
    if p.dropout:
        mha_philox_groups(groups, 0, <uint32_t>(i + p.query_start), <uint32_t>(n + p.batch_start),
                          <uint32_t>p.dropout_offset, <uint32_t>p.seed, <uint32_t>(p.seed >> 32), words)
        for e in range(size):
            half = words[((e & 7) >> 1) * groups + (e >> 3)] >> (16 * (e & 1)) & 0xffff
            x[e] = x[e] * <real>p.keep_scale if half >= <uint32_t>p.threshold else 0
    if p.key.data != NULL:
        load_vector(<int>p.key.storage, p.key.data, element(&p.key, n, 0, i), p.key.column, size, residual, 1)
        for e in range(size):
            x[e] += residual[e]
    store_vector(<int>p.output.storage, p.output.data, element(&p.output, n, 0, i), p.output.column, size, x, 1, 1)


cdef void dropout_worker(const AttentionParams* p, mha_schedule* schedule, int thread, const real* kind) noexcept nogil:
    cdef int64_t item
    item = next_item(schedule, thread, -1)
    while item >= 0:
        dropout_row(p, item // p.queries, item % p.queries, p.scratch + thread * p.scratch_bytes, kind)
        item = next_item(schedule, thread, item)


cdef int run_dropout(const AttentionParams* p, const real* kind) except -1:
    cdef mha_schedule schedule
    schedule_start(&schedule, p.batch * p.queries, <int>p.main_thread)
    with nogil, parallel(num_threads=<int>p.threads):
        dropout_worker(p, &schedule, threadid(), kind)
    return finished(&schedule)


def output_dropout_scratch(const unsigned char[::1] params, bint double_precision):
    """Bytes of scratch memory that one thread needs."""
    cdef char* cursor = NULL
    cdef const AttentionParams* p = checked_params(params)
    carve(&cursor, p.head_dim * (8 if double_precision else 4))
    carve(&cursor, p.head_dim * (8 if double_precision else 4))
    carve(&cursor, (p.head_dim + 7) // 8 * 16)
    return <Py_ssize_t>cursor


def output_dropout(const unsigned char[::1] params, bint double_precision):
    """Writes output = dropout(query) + key; returns the size of the team of threads."""
    cdef const AttentionParams* p = checked_params(params)
    if double_precision:
        return run_dropout(p, <const double*>NULL)
    return run_dropout(p, <const float*>NULL)
