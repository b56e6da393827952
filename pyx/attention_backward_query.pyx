"""Attention backward, query gradient alone: for problems with too few heads to give every thread one.

Lanes are queries, as in the forward; one work item is one panel of query rows.
"""
from cython.parallel cimport parallel, threadid
from libc.math cimport INFINITY
from libc.stdint cimport int64_t
from libc.string cimport memset
from params cimport AttentionParams, checked_params
from tile cimport (real, lanes, tile_product, tile_product_hiding, softmax_replay, softmax_gradient, softcap_gradient)
from mask cimport Panel, carve_panel, fill_panel, next_block, mask_scores, drop_scores, load_pairs
from storage cimport Block, key_rows, block_finite, load_panel, store_panel
from schedule cimport mha_schedule, schedule_start, keep_going, next_item, block_of_item, finished, carve


cdef struct QueryScratch:
    Panel panel
    char* query                     # [D][lanes]
    char* grad_output               # [Dv][lanes]
    char* grad_query                # [D][lanes]
    char* shift
    char* row_scale
    char* delta
    char* probability               # [key_block][lanes], and so are the next three
    char* gradient
    char* slope
    char* spare
    char* key                       # a converted block of K
    char* value


cdef Py_ssize_t carve_query(const AttentionParams* p, char* base, QueryScratch* scratch,
                            const real* kind) noexcept nogil:
    """Lays out one thread's scratch memory and returns its size."""
    cdef char* cursor = base
    cdef Py_ssize_t width = p.vectors * lanes(kind), size = sizeof(real), tile = p.key_block * width * size
    carve_panel(&scratch.panel, p.vectors, &cursor, kind)
    scratch.query = carve(&cursor, p.head_dim * width * size)
    scratch.grad_output = carve(&cursor, p.v_head_dim * width * size)
    scratch.grad_query = carve(&cursor, p.head_dim * width * size)
    scratch.shift = carve(&cursor, width * size)
    scratch.row_scale = carve(&cursor, width * size)
    scratch.delta = carve(&cursor, width * size)
    scratch.probability = carve(&cursor, tile)
    scratch.gradient = carve(&cursor, tile)
    scratch.slope = carve(&cursor, tile if p.softcap != 0 else 0)
    scratch.spare = carve(&cursor, tile)
    scratch.key = carve(&cursor, p.key_block * p.head_dim * size)
    scratch.value = carve(&cursor, p.key_block * p.v_head_dim * size)
    return cursor - base


cdef void load_query_panel(const AttentionParams* p, QueryScratch* scratch, bint gradients,
                           const real* kind) noexcept nogil:
    """Queries and the rows' statistics, for `gradients` also theirs; a row without a key gets shift = +inf: p = 0."""
    cdef Panel* panel = &scratch.panel
    cdef real* shift = <real*>scratch.shift
    cdef real* delta = <real*>scratch.delta
    cdef Py_ssize_t q
    cdef int64_t row
    load_panel(&p.query, panel, p.head_dim, <real*>scratch.query)
    if gradients:
        load_panel(&p.grad_output, panel, p.v_head_dim, <real*>scratch.grad_output)
    for q in range(panel.width):
        row = (panel.sample * p.heads + panel.head[q]) * p.queries + panel.query[q]
        shift[q] = (<const real*>p.shift)[row]
        (<real*>scratch.row_scale)[q] = (<const real*>p.row_scale)[row] if p.row_scale != NULL else 1
        if gradients:
            delta[q] = (<const real*>p.delta)[row]
        if shift[q] == <real>(-INFINITY):
            shift[q] = <real>INFINITY


cdef bint score_gradients(const AttentionParams* p, QueryScratch* scratch, int64_t j, int64_t count, Block key,
                          Block value, const real* kind) noexcept nogil:
    """scratch.gradient[count][lanes] = gradient of the scores of keys j .. j + count. Whether some are hidden."""
    cdef Panel* panel = &scratch.panel
    cdef Py_ssize_t width = panel.width, i
    cdef real* probability = <real*>scratch.probability
    cdef real* gradient = <real*>scratch.gradient
    cdef real* spare = <real*>scratch.spare
    cdef real* slope = <real*>scratch.slope if p.softcap != 0 else NULL
    tile_product(count, panel.vectors, p.head_dim, <const real*>key.data, key.row, key.column,
                 <const real*>scratch.query, width, probability, width, 0)
    cdef bint partial = mask_scores(p, panel, j, count, probability, spare, slope)
    softmax_replay(count, panel.vectors, probability, p.softmax_scale, <const real*>scratch.shift,
                   <const real*>scratch.row_scale if p.row_scale != NULL else NULL)
    tile_product(count, panel.vectors, p.v_head_dim, <const real*>value.data, value.row, value.column,
                 <const real*>scratch.grad_output, width, gradient, width, 0)
    if p.grad_weights.data != NULL:
        load_pairs(&p.grad_weights, panel, j, count, spare)
        for i in range(count * width):
            gradient[i] += spare[i] * <real>p.grad_weights_scale
    if p.dropout:
        drop_scores(p, panel, j, count, gradient)
    softmax_gradient(count, panel.vectors, probability, gradient, <const real*>scratch.delta, 0)
    return partial


cdef void backward_query_panel(const AttentionParams* p, Py_ssize_t n, Py_ssize_t kv_head, Py_ssize_t first,
                               Py_ssize_t rows, QueryScratch* scratch, mha_schedule* schedule, int thread,
                               const real* kind) noexcept nogil:
    """One work item."""
    cdef Panel* panel = &scratch.panel
    cdef int64_t j = 0, count = 0
    cdef Block key, value
    cdef real* gradient = <real*>scratch.gradient
    cdef real* grad_query = <real*>scratch.grad_query
    cdef bint partial
    fill_panel(p, panel, n, kv_head, first, rows, kind)
    load_query_panel(p, scratch, True, kind)
    memset(grad_query, 0, p.head_dim * panel.width * sizeof(real))
    while True:
        j = next_block(p, panel, j, &count)
        if j < 0 or not keep_going(schedule, thread):
            break
        key = key_rows(p, &p.key, n, kv_head, j, count, p.head_dim, <real*>scratch.key)
        value = key_rows(p, &p.value, n, kv_head, j, count, p.v_head_dim, <real*>scratch.value)
        partial = score_gradients(p, scratch, j, count, key, value, kind)
        if p.softcap != 0:
            softcap_gradient(count * panel.vectors, gradient, <const real*>scratch.slope)
        if partial and not block_finite(key, count, p.head_dim, kind):
            tile_product_hiding(p.head_dim, panel.vectors, count, <const real*>key.data, key.column, key.row, gradient,
                                panel.width, grad_query, panel.width, 1)
        else:
            tile_product(p.head_dim, panel.vectors, count, <const real*>key.data, key.column, key.row, gradient,
                         panel.width, grad_query, panel.width, 1)
        j += count
    store_panel(&p.grad_query, panel, p.head_dim, grad_query, p.score_scale * p.softmax_scale)


cdef void backward_query_worker(const AttentionParams* p, mha_schedule* schedule, int thread,
                                const real* kind) noexcept nogil:
    cdef QueryScratch scratch
    cdef int64_t item, head, block, width = p.vectors * lanes(kind), total = p.heads // p.kv_heads * p.queries
    cdef int64_t blocks = (total + width - 1) // width
    carve_query(p, p.scratch + thread * p.scratch_bytes, &scratch, kind)
    item = next_item(schedule, thread, -1)
    while item >= 0:
        block = blocks - 1 - block_of_item(item, blocks, p.batch * p.kv_heads, p.threads, &head)
        backward_query_panel(p, head // p.kv_heads, head % p.kv_heads, block * width, min(width, total - block * width),
                             &scratch, schedule, thread, kind)
        item = next_item(schedule, thread, item)


cdef int run_backward_query(const AttentionParams* p, const real* kind) except -1:
    cdef mha_schedule schedule
    cdef int64_t width = p.vectors * lanes(kind), total = p.heads // p.kv_heads * p.queries
    schedule_start(&schedule, (total + width - 1) // width * p.batch * p.kv_heads, <int>p.main_thread)
    with nogil, parallel(num_threads=<int>p.threads):
        backward_query_worker(p, &schedule, threadid(), kind)
    return finished(&schedule)


def attention_backward_query_scratch(const unsigned char[::1] params, bint double_precision):
    """Bytes of scratch memory that one thread needs."""
    cdef QueryScratch scratch
    cdef const AttentionParams* p = checked_params(params)
    if double_precision:
        return carve_query(p, NULL, &scratch, <const double*>NULL)
    return carve_query(p, NULL, &scratch, <const float*>NULL)


def attention_backward_query(const unsigned char[::1] params, bint double_precision):
    """Writes the gradient of the query; returns the size of the team of threads."""
    cdef const AttentionParams* p = checked_params(params)
    if double_precision:
        return run_backward_query(p, <const double*>NULL)
    return run_backward_query(p, <const float*>NULL)
