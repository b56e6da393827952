"""The tile of the backward whose lanes are keys: [queries][keys as lanes].

Everything that belongs to a key is local to such a panel, so the gradients of keys and values need no sums between
threads, and attention masks are read along their rows.
"""
from libc.math cimport INFINITY
from libc.stdint cimport int64_t, uint32_t
from params cimport AttentionParams, TensorView
from tile cimport (real, lanes, scale_scores, softcap_scores, add_bias, hide_flagged, hide_lanes, load_vector,
                   mha_philox_rows, drop_factors)
from mask cimport visible_keys, key_exists
from storage cimport element
from schedule cimport carve


cdef struct KeyPanel:
    Py_ssize_t sample
    Py_ssize_t kv_head
    int64_t first                   # keys [first, first + count)
    int64_t count
    Py_ssize_t vectors
    Py_ssize_t width
    bint appended                   # these keys are the appended ones
    bint hidden                     # padding hides some of them, or spare lanes exist
    bint lacking                    # the sample has not all of these keys
    bint finite                     # every value of these keys is finite
    char* lane_bias                 # added to each row: key_bias, -inf for what is hidden from all
    int64_t sample_of_ranges        # the sample low and high are of, -1 at first
    int64_t* low                    # (L,) query i sees low[i] <= key < high[i]
    int64_t* high
    uint32_t* draw_query            # dropout counters of a block of queries
    uint32_t* draw_head
    uint32_t* words


cdef inline void carve_key_panel(const AttentionParams* p, KeyPanel* panel, char** cursor,
                                 const real* kind) noexcept nogil:
    cdef Py_ssize_t width = p.vectors * lanes(kind)
    panel.lane_bias = carve(cursor, width * sizeof(real))
    panel.low = <int64_t*>carve(cursor, p.queries * 8)
    panel.high = <int64_t*>carve(cursor, p.queries * 8)
    panel.draw_query = <uint32_t*>carve(cursor, p.key_block * 4)
    panel.draw_head = <uint32_t*>carve(cursor, p.key_block * 4)
    panel.words = <uint32_t*>carve(cursor, (width // 8 + 2) * p.key_block * 16 if p.dropout else 0)
    panel.sample_of_ranges = -1


cdef inline int64_t key_panels(const AttentionParams* p, int64_t width) noexcept nogil:
    """How many panels the keys make; the appended keys have their own."""
    return (p.keys - p.extra + width - 1) // width + (p.extra + width - 1) // width


cdef inline void fill_key_panel(const AttentionParams* p, KeyPanel* panel, Py_ssize_t n, Py_ssize_t kv_head,
                                int64_t index, const real* kind) noexcept nogil:
    cdef int64_t own = p.keys - p.extra, width = p.vectors * lanes(kind), panels = (own + width - 1) // width, i, t
    cdef real* bias = <real*>panel.lane_bias
    panel.sample = n
    panel.kv_head = kv_head
    panel.appended = index >= panels
    panel.first = own + (index - panels) * width if panel.appended else index * width
    panel.count = min(width, (p.keys if panel.appended else own) - panel.first)
    panel.vectors = (panel.count + lanes(kind) - 1) // lanes(kind)
    panel.width = panel.vectors * lanes(kind)
    panel.lacking = False
    panel.hidden = panel.count < panel.width or (p.key_bias != NULL and not panel.appended)
    for t in range(panel.width):
        bias[t] = 0 if t < panel.count else <real>(-INFINITY)
        if t < panel.count and not panel.appended:
            if p.key_bias != NULL:
                bias[t] = (<const real*>p.key_bias)[n * own + panel.first + t]
            if not key_exists(p, n, panel.first + t):
                bias[t] = <real>(-INFINITY)
                panel.hidden = panel.lacking = True
    if panel.sample_of_ranges != n:
        for i in range(p.queries):
            visible_keys(p, n, i, &panel.low[i], &panel.high[i])
        panel.sample_of_ranges = n


cdef inline bint any_visible(const KeyPanel* panel, int64_t i, int64_t count) noexcept nogil:
    """Whether one of the queries i .. i + count sees a key of the panel by its range."""
    cdef int64_t t
    for t in range(i, i + count):
        if panel.high[t] >= 0 and (panel.appended or (panel.low[t] < panel.first + panel.count
                                                      and panel.high[t] > panel.first)):
            return True
    return False


cdef inline bint mask_query_scores(const AttentionParams* p, const KeyPanel* panel, Py_ssize_t head, int64_t i,
                                   int64_t count, real* s, real* spare, real* slope) noexcept nogil:
    """The scores s[count][keys as lanes] of queries i .. i + count: scale, softcap, biases, then what hides.

    Returns whether any score may have been hidden.
    """
    cdef Py_ssize_t vectors = panel.vectors, width = panel.width
    cdef bint partial = panel.hidden, own = not panel.appended
    cdef int64_t t, low, high
    cdef real* row = s
    if own and (p.pair_bias.data != NULL or p.pair_keep.data != NULL):
        partial = True
    if p.score_scale != 1:
        scale_scores(count * vectors, s, p.score_scale)
    if p.softcap != 0:
        softcap_scores(count * vectors, s, p.softcap, slope)
    for t in range(count):
        if own and p.pair_bias.data != NULL:
            load_vector(<int>p.pair_bias.storage, p.pair_bias.data,
                        element(&p.pair_bias, panel.sample, head, i + t) + panel.first * p.pair_bias.column,
                        p.pair_bias.column, panel.count, spare, 1)
            add_bias(vectors, row, spare, 0)
        if panel.hidden:
            add_bias(vectors, row, <const real*>panel.lane_bias, 0)
        if own and p.pair_keep.data != NULL:
            load_vector(<int>p.pair_keep.storage, p.pair_keep.data,
                        element(&p.pair_keep, panel.sample, head, i + t) + panel.first * p.pair_keep.column,
                        p.pair_keep.column, panel.count, spare, 1)
            hide_flagged(vectors, row, spare, <double>p.pair_hides)
        low = 0 if panel.appended else panel.low[i + t] - panel.first
        high = panel.high[i + t] if panel.high[i + t] < 0 else (panel.count if panel.appended
                                                                else panel.high[i + t] - panel.first)
        if low > 0 or high < panel.count:
            partial = True
            hide_lanes(width, row, low, high)
        row += width
    return partial


cdef inline void query_drop_factors(const AttentionParams* p, KeyPanel* panel, Py_ssize_t head, int64_t i,
                                    int64_t count, real* factor) noexcept nogil:
    """factor[count][keys as lanes]: 0 where dropout drops, 1 / (1 - p) elsewhere."""
    cdef int64_t key = panel.first + p.key_start, group, t
    cdef uint32_t seed_low = <uint32_t>p.seed, seed_high = <uint32_t>(p.seed >> 32)
    for t in range(count):
        panel.draw_query[t] = <uint32_t>(i + t + p.query_start)
        panel.draw_head[t] = <uint32_t>((panel.sample + p.batch_start) * p.total_heads + head + p.head_start)
    for group in range(key >> 3, ((key + panel.count - 1) >> 3) + 1):
        mha_philox_rows(count, <uint32_t>group, panel.draw_query, panel.draw_head, <uint32_t>p.dropout_offset,
                        seed_low, seed_high, panel.words + (group - (key >> 3)) * 4 * count)
    for t in range(count):
        drop_factors(panel.count, factor + t * panel.width, key, panel.words + t, count, <uint32_t>p.threshold,
                     p.keep_scale)
        for group in range(panel.count, panel.width):
            factor[t * panel.width + group] = 0
