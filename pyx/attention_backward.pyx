"""Attention backward by recomputation: gradients of keys and values, and of the queries in the same pass.

Lanes are keys. One work item is one key head of one sample (`fused`: five products, the query gradient gathers in
scratch memory) or one panel of its keys (four products; attention_backward_query does the rest). No sum crosses
threads, so the bits do not depend on their number. (Dao, "FlashAttention-2", 2023.)
"""
from cython.parallel cimport parallel, threadid
from libc.math cimport INFINITY
from libc.stdint cimport int64_t
from libc.string cimport memset
from params cimport AttentionParams, TensorView, checked_params
from tile cimport (real, lanes, tile_product, tile_product_hiding, softmax_replay_row, softmax_gradient,
                   softcap_gradient, multiply, load_vector, load_transposed, store_vector, store_transposed,
                   all_finite, MHA_NOWHERE, MHA_TILE_VECTORS, MOST_LANES)
from key_panel cimport (KeyPanel, carve_key_panel, key_panels, fill_key_panel, any_visible, mask_query_scores,
                        query_drop_factors)
from mask cimport key_exists
from storage cimport Block, query_rows, block_finite, element
from schedule cimport mha_schedule, schedule_start, keep_going, next_item, block_of_item, finished, carve


cdef struct BackwardScratch:
    KeyPanel panel
    char* key                       # [D][lanes]
    char* value                     # [Dv][lanes]
    char* key_rows                  # [lanes][padded D]; fused only
    char* grad_key                  # [D][lanes]
    char* grad_value                # [Dv][lanes]
    char* grad_query                # [queries of the group][padded D]; fused only
    char* probability               # [key_block][lanes], and so are the next four
    char* dropped
    char* gradient
    char* factor
    char* slope
    char* spare
    char* query                     # a converted block of queries, [key_block][D]
    char* grad_output


cdef Py_ssize_t padded(Py_ssize_t columns, const real* kind) noexcept nogil:
    return (columns + lanes(kind) - 1) // lanes(kind) * lanes(kind)


cdef Py_ssize_t carve_backward(const AttentionParams* p, char* base, BackwardScratch* scratch,
                               const real* kind) noexcept nogil:
    """Lays out one thread's scratch memory and returns its size."""
    cdef char* cursor = base
    cdef Py_ssize_t width = p.vectors * lanes(kind), size = sizeof(real), tile = p.key_block * width * size
    cdef Py_ssize_t columns = padded(p.head_dim, kind), rows = p.heads // p.kv_heads * p.queries
    carve_key_panel(p, &scratch.panel, &cursor, kind)
    scratch.key = carve(&cursor, p.head_dim * width * size)
    scratch.value = carve(&cursor, p.v_head_dim * width * size)
    scratch.key_rows = carve(&cursor, width * columns * size if p.fused else 0)
    scratch.grad_key = carve(&cursor, p.head_dim * width * size)
    scratch.grad_value = carve(&cursor, p.v_head_dim * width * size)
    scratch.grad_query = carve(&cursor, rows * columns * size if p.fused else 0)
    scratch.probability = carve(&cursor, tile)
    scratch.gradient = carve(&cursor, tile)
    scratch.dropped = carve(&cursor, tile if p.dropout else 0)
    scratch.factor = carve(&cursor, tile if p.dropout else 0)
    scratch.slope = carve(&cursor, tile if p.softcap != 0 else 0)
    scratch.spare = carve(&cursor, width * size)
    scratch.query = carve(&cursor, p.key_block * p.head_dim * size)
    scratch.grad_output = carve(&cursor, p.key_block * p.v_head_dim * size)
    return cursor - base


cdef void load_keys(const AttentionParams* p, const TensorView* x, BackwardScratch* scratch, Py_ssize_t columns,
                    real* transposed, real* rows) noexcept nogil:
    """transposed[columns][lanes] = x of the panel's keys, and rows[lanes][padded columns] = x if not NULL.

    Keys that the sample has not are zeros and never read.
    """
    cdef KeyPanel* panel = &scratch.panel
    cdef int64_t starts[MOST_LANES]
    cdef int64_t t, stride = padded(columns, transposed)
    for t in range(panel.count):
        starts[t] = MHA_NOWHERE
        if key_exists(p, panel.sample, panel.first + t):
            starts[t] = element(x, panel.sample, panel.kv_head, panel.first + t)
    load_transposed(<int>x.storage, x.data, starts, x.column, panel.count, columns, transposed, panel.width)
    if rows == NULL:
        return
    memset(rows, 0, panel.width * stride * sizeof(real))
    for t in range(panel.count):
        if starts[t] != MHA_NOWHERE:
            load_vector(<int>x.storage, x.data, starts[t], x.column, columns, rows + t * stride, 1)


cdef void store_keys(const TensorView* x, const KeyPanel* panel, Py_ssize_t columns, const real* transposed,
                     double factor) noexcept nogil:
    cdef int64_t starts[MOST_LANES]
    cdef int64_t t
    for t in range(panel.count):
        starts[t] = element(x, panel.sample, panel.kv_head, panel.first + t)
    store_transposed(<int>x.storage, x.data, starts, x.column, panel.count, columns, transposed, panel.width, factor)


cdef void add_grad_weights(const AttentionParams* p, const KeyPanel* panel, Py_ssize_t head, int64_t i, int64_t count,
                           real* gradient, real* spare) noexcept nogil:
    """gradient[count][lanes] += the gradient of the returned weights; averaged weights have head stride 0."""
    cdef const TensorView* x = &p.grad_weights
    cdef int64_t t, j
    for t in range(count):
        load_vector(<int>x.storage, x.data, element(x, panel.sample, head, i + t) + panel.first * x.column, x.column,
                    panel.count, spare, 1)
        for j in range(panel.count):
            gradient[t * panel.width + j] += spare[j] * <real>p.grad_weights_scale


cdef void backward_block(const AttentionParams* p, BackwardScratch* scratch, Py_ssize_t head, int64_t i,
                         int64_t count, const real* kind) noexcept nogil:
    """The share of queries i .. i + count of one query head in the gradients of the panel's keys (and theirs)."""
    cdef KeyPanel* panel = &scratch.panel
    cdef Py_ssize_t width = panel.width, vectors = panel.vectors, columns = padded(p.head_dim, kind), d, step
    cdef real* probability = <real*>scratch.probability
    cdef real* gradient = <real*>scratch.gradient
    cdef real* dropped = probability
    cdef real* slope = <real*>scratch.slope if p.softcap != 0 else NULL
    cdef int64_t row = (panel.sample * p.heads + head) * p.queries + i
    cdef const real* shift = <const real*>p.shift + row
    cdef const real* delta = <const real*>p.delta + row
    cdef Block query = query_rows(&p.query, panel.sample, head, i, count, p.head_dim, <real*>scratch.query)
    cdef Block grad_output = query_rows(&p.grad_output, panel.sample, head, i, count, p.v_head_dim,
                                        <real*>scratch.grad_output)
    cdef real* grad_query
    cdef int64_t t
    tile_product(count, vectors, p.head_dim, <const real*>query.data, query.row, query.column,
                 <const real*>scratch.key, width, probability, width, 0)
    cdef bint partial = mask_query_scores(p, panel, head, i, count, probability, <real*>scratch.spare, slope)
    for t in range(count):
        softmax_replay_row(vectors, probability + t * width, p.softmax_scale,
                           shift[t] if shift[t] != <real>(-INFINITY) else INFINITY,
                           (<const real*>p.row_scale)[row + t] if p.row_scale != NULL else 1)
    tile_product(count, vectors, p.v_head_dim, <const real*>grad_output.data, grad_output.row, grad_output.column,
                 <const real*>scratch.value, width, gradient, width, 0)
    if p.grad_weights.data != NULL:
        add_grad_weights(p, panel, head, i, count, gradient, <real*>scratch.spare)
    if p.dropout:
        dropped = <real*>scratch.dropped
        query_drop_factors(p, panel, head, i, count, <real*>scratch.factor)
        multiply(count * width, dropped, probability, <real*>scratch.factor)
        multiply(count * width, gradient, gradient, <real*>scratch.factor)
    accumulate(partial, p.v_head_dim, vectors, count, grad_output, dropped, <real*>scratch.grad_value, width)
    softmax_gradient(count, vectors, probability, gradient, delta, 1)
    if slope != NULL:
        softcap_gradient(count * vectors, gradient, slope)
    accumulate(partial, p.head_dim, vectors, count, query, gradient, <real*>scratch.grad_key, width)
    if not p.fused:
        return
    grad_query = <real*>scratch.grad_query + ((head % (p.heads // p.kv_heads)) * p.queries + i) * columns
    d = 0
    while d < columns:
        step = min(MHA_TILE_VECTORS * lanes(kind), columns - d) // lanes(kind)
        if partial and not panel.finite:
            tile_product_hiding(count, step, width, gradient, width, 1, <real*>scratch.key_rows + d, columns,
                                grad_query + d, columns, 0)
        else:
            tile_product(count, step, width, gradient, width, 1, <real*>scratch.key_rows + d, columns,
                         grad_query + d, columns, 1)
        d += MHA_TILE_VECTORS * lanes(kind)


cdef inline void accumulate(bint partial, Py_ssize_t columns, Py_ssize_t vectors, int64_t count, Block rows,
                            const real* probability, real* out, Py_ssize_t width) noexcept nogil:
    """out[columns][lanes] += rows[count][columns] transposed times probability[count][lanes]."""
    if partial and not block_finite(rows, count, columns, probability):
        tile_product_hiding(columns, vectors, count, <const real*>rows.data, rows.column, rows.row, probability, width,
                            out, width, 1)
    else:
        tile_product(columns, vectors, count, <const real*>rows.data, rows.column, rows.row, probability, width, out,
                     width, 1)


cdef bint backward_panel(const AttentionParams* p, BackwardScratch* scratch, Py_ssize_t n, Py_ssize_t kv_head,
                         int64_t index, mha_schedule* schedule, int thread, const real* kind) noexcept nogil:
    """Gradients of one panel of keys. Returns whether to go on."""
    cdef KeyPanel* panel = &scratch.panel
    cdef Py_ssize_t group = p.heads // p.kv_heads, g
    cdef int64_t i, count
    fill_key_panel(p, panel, n, kv_head, index, kind)
    load_keys(p, &p.key, scratch, p.head_dim, <real*>scratch.key, <real*>scratch.key_rows if p.fused else NULL)
    load_keys(p, &p.value, scratch, p.v_head_dim, <real*>scratch.value, <real*>NULL)
    panel.finite = all_finite(<const real*>scratch.key, p.head_dim, panel.width, panel.width, 1)
    memset(scratch.grad_key, 0, p.head_dim * panel.width * sizeof(real))
    memset(scratch.grad_value, 0, p.v_head_dim * panel.width * sizeof(real))
    for g in range(group):
        i = 0
        while i < p.queries:
            if not keep_going(schedule, thread):
                return False
            count = min(p.key_block, p.queries - i)
            if any_visible(panel, i, count):
                backward_block(p, scratch, kv_head * group + g, i, count, kind)
            i += count
    store_keys(&p.grad_key, panel, p.head_dim, <const real*>scratch.grad_key,
               p.score_scale * p.softmax_scale)
    store_keys(&p.grad_value, panel, p.v_head_dim, <const real*>scratch.grad_value, 1)
    return True


cdef void backward_head(const AttentionParams* p, BackwardScratch* scratch, Py_ssize_t n, Py_ssize_t kv_head,
                        mha_schedule* schedule, int thread, const real* kind) noexcept nogil:
    """Fused: all gradients of one key head."""
    cdef Py_ssize_t columns = padded(p.head_dim, kind), group = p.heads // p.kv_heads, g
    cdef int64_t index, i
    cdef const TensorView* x = &p.grad_query
    memset(scratch.grad_query, 0, group * p.queries * columns * sizeof(real))
    for index in range(key_panels(p, p.vectors * lanes(kind))):
        if not backward_panel(p, scratch, n, kv_head, index, schedule, thread, kind):
            return
    for g in range(group):
        for i in range(p.queries):
            store_vector(<int>x.storage, x.data, element(x, n, kv_head * group + g, i), x.column, p.head_dim,
                         <const real*>scratch.grad_query + (g * p.queries + i) * columns, 1,
                         p.score_scale * p.softmax_scale)


cdef void backward_worker(const AttentionParams* p, int64_t panels, mha_schedule* schedule, int thread,
                          const real* kind) noexcept nogil:
    cdef BackwardScratch scratch
    cdef int64_t item, head, index
    carve_backward(p, p.scratch + thread * p.scratch_bytes, &scratch, kind)
    item = next_item(schedule, thread, -1)
    while item >= 0:
        if p.fused:
            backward_head(p, &scratch, item // p.kv_heads, item % p.kv_heads, schedule, thread, kind)
        else:
            # the first keys are seen most under a causal mask
            index = block_of_item(item, panels, p.batch * p.kv_heads, p.threads, &head)
            backward_panel(p, &scratch, head // p.kv_heads, head % p.kv_heads, index, schedule, thread, kind)
        item = next_item(schedule, thread, item)


cdef int run_backward(const AttentionParams* p, const real* kind) except -1:
    cdef mha_schedule schedule
    cdef int64_t panels = key_panels(p, p.vectors * lanes(kind))
    schedule_start(&schedule, p.batch * p.kv_heads * (1 if p.fused else panels), <int>p.main_thread)
    with nogil, parallel(num_threads=<int>p.threads):
        backward_worker(p, panels, &schedule, threadid(), kind)
    return finished(&schedule)


def attention_backward_scratch(const unsigned char[::1] params, bint double_precision):
    """Bytes of scratch memory that one thread needs."""
    cdef BackwardScratch scratch
    cdef const AttentionParams* p = checked_params(params)
    if double_precision:
        return carve_backward(p, NULL, &scratch, <const double*>NULL)
    return carve_backward(p, NULL, &scratch, <const float*>NULL)


def attention_backward(const unsigned char[::1] params, bint double_precision):
    """Writes the gradients of key and value, with `fused` of the query too; returns the size of the team."""
    cdef const AttentionParams* p = checked_params(params)
    if double_precision:
        return run_backward(p, <const double*>NULL)
    return run_backward(p, <const float*>NULL)
