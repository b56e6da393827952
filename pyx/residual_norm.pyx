"""Dropout, the residual link and layer norm of a layer's output, forward and backward, each in one pass over its rows.

A work item is a block of rows. The number of blocks depends on the problem only, and the sums over rows, the
gradients of the norm's scale and bias, are added block by block in their order: equal bits for any number of threads.
"""
from cython.parallel cimport parallel, threadid
from libc.stdint cimport int64_t, uint32_t
from libc.string cimport memcpy, memset
from params cimport NormParams, TensorView, checked_norm_params
from tile cimport (real, load_vector, store_vector, mha_philox_groups, normalise_row, normalise_row_gradient)
from storage cimport element
from schedule cimport mha_schedule, schedule_start, next_item, finished, carve


cdef struct NormScratch:
    char* x                         # [E] each
    char* other
    char* words                     # random numbers


cdef Py_ssize_t carve_norm(const NormParams* p, char* base, NormScratch* scratch, const real* kind) noexcept nogil:
    """Lays out one thread's scratch memory and returns its size."""
    cdef char* cursor = base
    scratch.x = carve(&cursor, p.features * sizeof(real))
    scratch.other = carve(&cursor, p.features * sizeof(real))
    scratch.words = carve(&cursor, (p.features + 7) // 8 * 16 if p.dropout else 0)
    return cursor - base


cdef inline void read_features(const NormParams* p, const TensorView* x, int64_t n, int64_t i,
                               real* out) noexcept nogil:
    load_vector(<int>x.storage, x.data, element(x, n, 0, i), x.column, p.features, out, 1)


cdef inline void write_features(const NormParams* p, const TensorView* x, int64_t n, int64_t i,
                                const real* row) noexcept nogil:
    store_vector(<int>x.storage, x.data, element(x, n, 0, i), x.column, p.features, row, 1, 1)


cdef void drop_row(const NormParams* p, int64_t n, int64_t i, real* x, uint32_t* words) noexcept nogil:
    cdef int64_t groups = (p.features + 7) // 8, e
    cdef uint32_t half
    mha_philox_groups(groups, 0, <uint32_t>(i + p.query_start), <uint32_t>(n + p.batch_start),
                      <uint32_t>p.dropout_offset, <uint32_t>p.seed, <uint32_t>(p.seed >> 32), words)
    for e in range(p.features):
        half = words[((e & 7) >> 1) * groups + (e >> 3)] >> (16 * (e & 1)) & 0xffff
        x[e] = x[e] * <real>p.keep_scale if half >= <uint32_t>p.threshold else 0


cdef void forward_row(const NormParams* p, int64_t n, int64_t i, NormScratch* scratch, const real* kind) noexcept nogil:
    """total = dropout(x) + residual; output = norm(total) * scale + bias."""
    cdef real* x = <real*>scratch.x
    cdef real* other = <real*>scratch.other
    cdef const real* scale = <const real*>p.scale
    cdef const real* bias = <const real*>p.bias
    cdef int64_t e
    read_features(p, &p.x, n, i, x)
    if p.dropout:
        drop_row(p, n, i, x, <uint32_t*>scratch.words)
    if p.residual.data != NULL:
        read_features(p, &p.residual, n, i, other)
        for e in range(p.features):
            x[e] += other[e]
    if p.total.data != NULL:
        write_features(p, &p.total, n, i, x)
    if p.normalise:
        normalise_row(p.features, x, p.epsilon)
    if scale != NULL and bias != NULL:
        for e in range(p.features):
            x[e] = x[e] * scale[e] + bias[e]
    elif scale != NULL:
        for e in range(p.features):
            x[e] *= scale[e]
    elif bias != NULL:
        for e in range(p.features):
            x[e] += bias[e]
    write_features(p, &p.output, n, i, x)


cdef void backward_row(const NormParams* p, int64_t n, int64_t i, NormScratch* scratch, real* of_scale,
                       real* of_bias) noexcept nogil:
    """From the gradient in `output` to those of total and x; those of scale and bias are added to."""
    cdef real* x = <real*>scratch.x
    cdef real* g = <real*>scratch.other
    cdef const real* scale = <const real*>p.scale
    cdef double factor
    cdef int64_t e
    read_features(p, &p.total, n, i, x)
    read_features(p, &p.output, n, i, g)
    factor = normalise_row(p.features, x, p.epsilon)
    for e in range(p.features):
        of_scale[e] += g[e] * x[e]
        of_bias[e] += g[e]
    if scale != NULL:
        for e in range(p.features):
            g[e] *= scale[e]
    normalise_row_gradient(p.features, x, g, factor)
    write_features(p, &p.residual, n, i, g)
    if p.x.data != NULL:
        if p.dropout:
            drop_row(p, n, i, g, <uint32_t*>scratch.words)
        write_features(p, &p.x, n, i, g)


cdef void norm_worker(const NormParams* p, bint backward, mha_schedule* schedule, int thread,
                      const real* kind) noexcept nogil:
    cdef NormScratch scratch
    cdef int64_t item, row, rows = p.batch * p.queries
    cdef real* sums = NULL
    carve_norm(p, p.scratch + thread * p.scratch_bytes, &scratch, kind)
    item = next_item(schedule, thread, -1)
    while item >= 0:
        if backward:
            sums = <real*>p.partials + item * 2 * p.features
            memset(sums, 0, 2 * p.features * sizeof(real))
        for row in range(item * p.row_block, min(rows, (item + 1) * p.row_block)):
            if backward:
                backward_row(p, row // p.queries, row % p.queries, &scratch, sums, sums + p.features)
            else:
                forward_row(p, row // p.queries, row % p.queries, &scratch, kind)
        item = next_item(schedule, thread, item)


cdef int run_norm(const NormParams* p, bint backward, const real* kind) except -1:
    cdef mha_schedule schedule
    cdef int64_t blocks = (p.batch * p.queries + p.row_block - 1) // p.row_block, block, e
    cdef real* sums = <real*>p.partials
    schedule_start(&schedule, blocks, <int>p.main_thread)
    with nogil, parallel(num_threads=<int>p.threads):
        norm_worker(p, backward, &schedule, threadid(), kind)
    if backward:
        for block in range(1, blocks):
            for e in range(2 * p.features):
                sums[e] += sums[block * 2 * p.features + e]
        memcpy(p.grad_scale, sums, p.features * sizeof(real))
        memcpy(p.grad_bias, sums + p.features, p.features * sizeof(real))
    return finished(&schedule)


def residual_norm_scratch(const unsigned char[::1] params, bint double_precision):
    """Bytes of scratch memory that one thread needs."""
    cdef NormScratch scratch
    cdef const NormParams* p = checked_norm_params(params)
    if double_precision:
        return carve_norm(p, NULL, &scratch, <const double*>NULL)
    return carve_norm(p, NULL, &scratch, <const float*>NULL)


def residual_norm_backward_scratch(const unsigned char[::1] params, bint double_precision):
    """Bytes of scratch memory that one thread needs."""
    return residual_norm_scratch(params, double_precision)


def residual_norm(const unsigned char[::1] params, bint double_precision):
    """Writes output and total; returns the size of the team of threads."""
    cdef const NormParams* p = checked_norm_params(params)
    if double_precision:
        return run_norm(p, False, <const double*>NULL)
    return run_norm(p, False, <const float*>NULL)


def residual_norm_backward(const unsigned char[::1] params, bint double_precision):
    """Reads output, as a gradient, and total; writes the gradients into residual and x, and of scale and bias."""
    cdef const NormParams* p = checked_norm_params(params)
    if double_precision:
        return run_norm(p, True, <const double*>NULL)
    return run_norm(p, True, <const float*>NULL)
