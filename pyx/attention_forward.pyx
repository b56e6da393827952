"""Attention forward: blocks of keys against panels of queries, online softmax, nothing of size L x S.

Scores are computed transposed, [keys][queries as lanes]: K and V are used where they lie, the softmax is vertical,
and the probabilities are already the packed operand of the second product. (Dao et al., "FlashAttention", 2022.)
"""
from cython.parallel cimport parallel, threadid
from libc.math cimport INFINITY, log
from libc.stdint cimport int64_t, uint16_t
from libc.string cimport memset
from params cimport AttentionParams, checked_params
from tile cimport (real, lanes, tile_product, tile_product_hiding, pair_product, pair_rows, pairs_finite,
                   softmax_absorb, scale_lanes, mha_tiles_begin, mha_tiles_end, MHA_TILED)
from mask cimport Panel, carve_panel, fill_panel, next_block, mask_scores, drop_scores
from storage cimport Block, key_rows, block_finite, load_panel, store_panel
from pairs cimport key_pairs, value_pairs, turned_row
from schedule cimport mha_schedule, schedule_start, keep_going, next_item, block_of_item, finished, carve

cdef enum:
    MAX_PANELS = 4


cdef struct ForwardScratch:
    Panel panels[MAX_PANELS]
    char* query[MAX_PANELS]         # [D][lanes]; or pairs, [pairs of D][lanes]
    char* output[MAX_PANELS]        # [Dv][lanes]
    char* maximum[MAX_PANELS]
    char* sum[MAX_PANELS]
    char* rescale
    char* scores                    # [key_block][lanes]
    char* spare                     # the same
    char* key                       # a converted block of K, [key_block][D]
    char* value
    char* value_pairs               # [pairs of keys][Dv]
    char* value_turned              # [Dv][pairs of keys]


cdef Py_ssize_t carve_forward(const AttentionParams* p, char* base, ForwardScratch* scratch,
                              const real* kind) noexcept nogil:
    """Lays out one thread's scratch memory and returns its size."""
    cdef char* cursor = base
    cdef Py_ssize_t width = p.vectors * lanes(kind), size = sizeof(real), i, pairs
    for i in range(p.panels):
        carve_panel(&scratch.panels[i], p.vectors, &cursor, kind)
        scratch.query[i] = carve(&cursor, p.head_dim * width * size)
        scratch.output[i] = carve(&cursor, p.v_head_dim * width * size)
        scratch.maximum[i] = carve(&cursor, width * size)
        scratch.sum[i] = carve(&cursor, width * size)
    scratch.rescale = carve(&cursor, width * size)
    scratch.scores = carve(&cursor, p.key_block * width * size)
    scratch.spare = carve(&cursor, p.key_block * width * size)
    scratch.key = carve(&cursor, p.key_block * p.head_dim * size)
    scratch.value = carve(&cursor, p.key_block * p.v_head_dim * size)
    if p.paired:
        # Transposing takes whole tiles, past the last column too.
        pairs = turned_row(p.key_block)
        scratch.value_pairs = carve(&cursor, (pairs * p.v_head_dim + 16) * size)
        scratch.value_turned = carve(&cursor, (p.v_head_dim + 15) // 16 * 16 * pairs * size if MHA_TILED else 0)
    return cursor - base


cdef void absorb_block(const AttentionParams* p, ForwardScratch* scratch, Py_ssize_t i, int64_t j, int64_t count,
                       Block key, Block value, const real* kind) noexcept nogil:
    """Takes keys j .. j + count into the running softmax and output of panel `i`."""
    cdef Panel* panel = &scratch.panels[i]
    cdef real* s = <real*>scratch.scores
    cdef real* output = <real*>scratch.output[i]
    cdef real* rescale = <real*>scratch.rescale
    cdef Py_ssize_t width = panel.width
    if real is float and p.paired:
        pair_product(count, panel.vectors, (p.head_dim + 1) // 2, <const uint16_t*>key.data, key.row, key.column,
                     <const float*>scratch.query[i], width, s, width, 0)
    else:
        tile_product(count, panel.vectors, p.head_dim, <const real*>key.data, key.row, key.column,
                     <const real*>scratch.query[i], width, s, width, 0)
    cdef bint partial = mask_scores(p, panel, j, count, s, <real*>scratch.spare, <real*>NULL)
    if softmax_absorb(count, panel.vectors, s, p.softmax_scale, <real*>scratch.maximum[i], <real*>scratch.sum[i],
                      rescale):
        scale_lanes(p.v_head_dim, panel.vectors, output, rescale)
    if p.dropout:
        drop_scores(p, panel, j, count, s)
    if real is float and p.paired:
        if not partial or pairs_finite(<const uint16_t*>scratch.value_pairs, (count + 1) // 2 * 2 * p.v_head_dim):
            pair_rows(count, width, s, s)
            pair_product(p.v_head_dim, panel.vectors, (count + 1) // 2, <const uint16_t*>value.data, value.column,
                         value.row, s, width, output, width, 1)
            return
        value = key_rows(p, &p.value, panel.sample, panel.kv_head, j, count, p.v_head_dim, <real*>scratch.value)
    if partial and not block_finite(value, count, p.v_head_dim, kind):
        tile_product_hiding(p.v_head_dim, panel.vectors, count, <const real*>value.data, value.column, value.row,
                            s, width, output, width, 1)
    else:
        tile_product(p.v_head_dim, panel.vectors, count, <const real*>value.data, value.column, value.row, s, width,
                     output, width, 1)


cdef inline void store_statistics(const AttentionParams* p, int64_t row, real maximum, real sum) noexcept nogil:
    """The row's log-sum-exp, and for the backward what it is made of: the logarithm's rounding is lost on them."""
    (<real*>p.lse)[row] = maximum + <real>log(sum) if sum != 0 else <real>(-INFINITY)
    if p.shift != NULL:
        (<real*>p.shift)[row] = maximum
        (<real*>p.row_scale)[row] = 1 / sum if sum != 0 else 0


cdef void finish_panel(const AttentionParams* p, ForwardScratch* scratch, Py_ssize_t i,
                       const real* kind) noexcept nogil:
    """Divides by the sums and stores the output and the log-sum-exp."""
    cdef Panel* panel = &scratch.panels[i]
    cdef real* maximum = <real*>scratch.maximum[i]
    cdef real* sum = <real*>scratch.sum[i]
    cdef Py_ssize_t q
    for q in range(panel.rows):
        store_statistics(p, (panel.sample * p.heads + panel.head[q]) * p.queries + panel.query[q], maximum[q], sum[q])
    for q in range(panel.width):
        sum[q] = 1 / sum[q] if sum[q] != 0 else 0
    scale_lanes(p.v_head_dim, panel.vectors, <real*>scratch.output[i], sum)
    store_panel(&p.output, panel, p.v_head_dim, <const real*>scratch.output[i], 1)


cdef void forward_block(const AttentionParams* p, Py_ssize_t n, Py_ssize_t kv_head, Py_ssize_t first,
                        ForwardScratch* scratch, mha_schedule* schedule, int thread, const real* kind) noexcept nogil:
    """One work item: a block of query rows of one key head."""
    cdef Py_ssize_t width = p.vectors * lanes(kind), total = p.heads // p.kv_heads * p.queries, panels = 0, q, i
    cdef int64_t j = 0, count = 0
    cdef Block key, value
    cdef Panel all_panels
    while panels < p.panels and first + panels * width < total:
        fill_panel(p, &scratch.panels[panels], n, kv_head, first + panels * width,
                   min(width, total - first - panels * width), kind)
        load_panel(&p.query, &scratch.panels[panels], p.head_dim, <real*>scratch.query[panels])
        if real is float and p.paired:
            pair_rows(p.head_dim, scratch.panels[panels].width, <float*>scratch.query[panels],
                      <float*>scratch.query[panels])
        memset(scratch.output[panels], 0, p.v_head_dim * width * sizeof(real))
        memset(scratch.sum[panels], 0, width * sizeof(real))
        for q in range(width):
            (<real*>scratch.maximum[panels])[q] = <real>(-INFINITY)
        panels += 1
    all_panels = scratch.panels[0]
    for i in range(1, panels):
        all_panels.start = min(all_panels.start, scratch.panels[i].start)
        all_panels.stop = max(all_panels.stop, scratch.panels[i].stop)
    while True:
        j = next_block(p, &all_panels, j, &count)
        if j < 0 or not keep_going(schedule, thread):
            break
        if p.paired:
            key = key_pairs(p, n, kv_head, j, count, scratch.key)
            value = value_pairs(p, n, kv_head, j, count, scratch.value_pairs, scratch.value_turned)
            mha_tiles_begin()
        else:
            key = key_rows(p, &p.key, n, kv_head, j, count, p.head_dim, <real*>scratch.key)
            value = key_rows(p, &p.value, n, kv_head, j, count, p.v_head_dim, <real*>scratch.value)
        for i in range(panels):
            if j >= p.keys - p.extra or (j < scratch.panels[i].stop and j + count > scratch.panels[i].start):
                absorb_block(p, scratch, i, j, count, key, value, kind)
        if p.paired:
            mha_tiles_end()
        j += count
    for i in range(panels):
        finish_panel(p, scratch, i, kind)


cdef void forward_worker(const AttentionParams* p, mha_schedule* schedule, int thread, const real* kind) noexcept nogil:
    cdef ForwardScratch scratch
    cdef int64_t item, head, block, rows = p.vectors * lanes(kind) * p.panels
    cdef int64_t blocks = (p.heads // p.kv_heads * p.queries + rows - 1) // rows
    carve_forward(p, p.scratch + thread * p.scratch_bytes, &scratch, kind)
    item = next_item(schedule, thread, -1)
    while item >= 0:
        # the last rows see most under a causal mask
        block = blocks - 1 - block_of_item(item, blocks, p.batch * p.kv_heads, p.threads, &head)
        forward_block(p, head // p.kv_heads, head % p.kv_heads, block * rows, &scratch, schedule, thread, kind)
        item = next_item(schedule, thread, item)


cdef int run_forward(const AttentionParams* p, const real* kind) except -1:
    cdef mha_schedule schedule
    cdef int64_t rows = p.vectors * lanes(kind) * p.panels, total = p.heads // p.kv_heads * p.queries
    schedule_start(&schedule, (total + rows - 1) // rows * p.batch * p.kv_heads, <int>p.main_thread)
    with nogil, parallel(num_threads=<int>p.threads):
        forward_worker(p, &schedule, threadid(), kind)
    return finished(&schedule)


def attention_forward_scratch(const unsigned char[::1] params, bint double_precision):
    """Bytes of scratch memory that one thread needs."""
    cdef ForwardScratch scratch
    cdef const AttentionParams* p = checked_params(params)
    if double_precision:
        return carve_forward(p, NULL, &scratch, <const double*>NULL)
    return carve_forward(p, NULL, &scratch, <const float*>NULL)


def attention_forward(const unsigned char[::1] params, bint double_precision):
    """Writes output and log-sum-exp; returns the size of the team of threads."""
    cdef const AttentionParams* p = checked_params(params)
    if double_precision:
        return run_forward(p, <const double*>NULL)
    return run_forward(p, <const float*>NULL)
