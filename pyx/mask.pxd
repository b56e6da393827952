"""Which scores of a tile are visible, and what is added to them.

A tile is either [keys][queries as lanes] (forward, weights, query gradient) or [queries][keys as lanes] (key and
value gradients). Masks are read where the user keeps them, broadcast axes with stride 0.
"""
from libc.stdint cimport int64_t, uint32_t
from libc.math cimport INFINITY
from params cimport AttentionParams, TensorView
from tile cimport (real, lanes, scale_scores, softcap_scores, add_bias, hide_flagged, hide_key, hide_lanes, drop_lanes,
                   load_transposed, mha_philox_rows, MHA_TILED, MOST_LANES)
from schedule cimport carve

cdef enum:
    TILED_KEYS = 32                 # that one step of the matrix tiles takes


cdef struct Panel:
    # the queries that the lanes of a panel stand for: rows [first, first + rows) of the queries of all heads of a group
    Py_ssize_t sample
    Py_ssize_t kv_head
    Py_ssize_t first
    Py_ssize_t rows
    Py_ssize_t vectors
    Py_ssize_t width
    int64_t* query                  # each lane's query index
    int64_t* head                   # and its query head
    int64_t* low                    # it sees low <= key < high; high = -1: a row past its sample's length sees nothing
    int64_t* high
    uint32_t* draw_query            # the dropout counters
    uint32_t* draw_head
    uint32_t* words
    char* low_here                  # low and high within a block, in the computing type
    char* high_here
    int64_t start                   # keys seen by any lane
    int64_t stop
    int64_t all_start               # keys seen by every lane
    int64_t all_stop


cdef inline void visible_keys(const AttentionParams* p, Py_ssize_t n, int64_t i, int64_t* low,
                              int64_t* high) noexcept nogil:
    """The range of keys that query `i` of sample `n` sees, appended keys apart; high = -1 for an empty row."""
    cdef int64_t position = i + p.position + (p.offset[n] if p.offset != NULL else 0)
    cdef int64_t lo = 0, hi = p.keys - p.extra
    if p.left >= 0 and position - p.left > lo:
        lo = position - p.left
    if p.right >= 0 and position + p.right + 1 < hi:
        hi = position + p.right + 1
    if p.row_low != NULL:
        lo = max(lo, p.row_low[i])
        hi = min(hi, p.row_high[i])
    if p.key_lengths != NULL:
        hi = min(hi, p.key_lengths[n])
    if hi < lo:
        lo = hi = max(<int64_t>0, min(lo, hi))
    if p.query_lengths != NULL and i >= p.query_lengths[n]:
        lo = 0
        hi = -1
    low[0] = lo
    high[0] = hi


cdef inline void carve_panel(Panel* panel, Py_ssize_t vectors, char** cursor, const real* kind) noexcept nogil:
    cdef Py_ssize_t width = vectors * lanes(kind)
    panel.query = <int64_t*>carve(cursor, width * 8)
    panel.head = <int64_t*>carve(cursor, width * 8)
    panel.low = <int64_t*>carve(cursor, width * 8)
    panel.high = <int64_t*>carve(cursor, width * 8)
    panel.draw_query = <uint32_t*>carve(cursor, width * 4)
    panel.draw_head = <uint32_t*>carve(cursor, width * 4)
    panel.words = <uint32_t*>carve(cursor, width * 16)
    panel.low_here = carve(cursor, width * sizeof(real))
    panel.high_here = carve(cursor, width * sizeof(real))


cdef inline void fill_panel(const AttentionParams* p, Panel* panel, Py_ssize_t n, Py_ssize_t kv_head, Py_ssize_t first,
                            Py_ssize_t rows, const real* kind) noexcept nogil:
    """`first` counts the queries of all query heads that share `kv_head`, head by head."""
    cdef Py_ssize_t group = p.heads // p.kv_heads, q, row
    cdef int64_t low, high
    panel.sample = n
    panel.kv_head = kv_head
    panel.first = first
    panel.rows = rows
    panel.vectors = (rows + lanes(kind) - 1) // lanes(kind)
    panel.width = panel.vectors * lanes(kind)
    panel.start = panel.all_stop = p.keys
    panel.stop = panel.all_start = 0
    for q in range(panel.width):
        row = first + min(q, rows - 1)          # spare lanes repeat the last row and are never stored
        panel.query[q] = row % p.queries
        panel.head[q] = kv_head * group + row // p.queries
        visible_keys(p, n, panel.query[q], &low, &high)
        panel.low[q] = low
        panel.high[q] = high
        panel.draw_query[q] = <uint32_t>(panel.query[q] + p.query_start)
        panel.draw_head[q] = <uint32_t>((n + p.batch_start) * p.total_heads + panel.head[q] + p.head_start)
        if low < high:
            panel.start = min(panel.start, low)
            panel.stop = max(panel.stop, high)
        panel.all_start = max(panel.all_start, low)
        panel.all_stop = min(panel.all_stop, high)


cdef inline int64_t next_block(const AttentionParams* p, const Panel* panel, int64_t j, int64_t* count) noexcept nogil:
    """The first key and the size of the block at or after key `j` that holds a key some lane may see; -1: none left.

    Blocks end at multiples of the block size, so that a row's sums are made alike whichever rows share its panel. The
    appended keys are a block of their own; blocks in which padding hides everything are passed over.
    """
    cdef int64_t own = p.keys - p.extra, entry = j, stop
    cdef const unsigned char* keep = NULL
    if p.key_keep != NULL:
        keep = p.key_keep + panel.sample * own
    if j < own:
        j = max(j, panel.start)
        stop = min(panel.stop, own)
        if keep != NULL:
            while j < stop and not keep[j]:
                j += 1
        if j < stop:
            stop = min(stop, j - j % p.key_block + p.key_block)
            if keep != NULL:
                while not keep[stop - 1]:
                    stop -= 1
            if p.paired and MHA_TILED:
                # Tiles and the vectors beside them add in different orders, so that where tiles lie must not depend on
                # which rows share a panel either: whole ones from the first key on.
                j = max(entry, j - j % TILED_KEYS)
                stop = min(own, (stop + TILED_KEYS - 1) // TILED_KEYS * TILED_KEYS)
            count[0] = stop - j
            return j
        j = own
    if j < p.keys:
        count[0] = min(p.keys - j, p.key_block)
        return j
    return -1


cdef inline bint key_exists(const AttentionParams* p, Py_ssize_t n, int64_t j) noexcept nogil:
    """Whether sample `n` has key `j` at all: neither padding nor its length hides it. Others are never read."""
    cdef int64_t own = p.keys - p.extra
    if j >= own:
        return True
    if p.key_lengths != NULL and j >= p.key_lengths[n]:
        return False
    return p.key_keep == NULL or p.key_keep[n * own + j]


cdef inline bint block_has_hidden(const AttentionParams* p, Py_ssize_t n, int64_t j, int64_t count) noexcept nogil:
    """Whether the sample lacks one of these keys."""
    cdef int64_t t
    if p.key_keep == NULL and (p.key_lengths == NULL or j + count <= p.key_lengths[n]):
        return False
    for t in range(j, j + count):
        if not key_exists(p, n, t):
            return True
    return False


cdef inline bint mask_scores(const AttentionParams* p, Panel* panel, int64_t j, int64_t count, real* s, real* spare,
                             real* slope) noexcept nogil:
    """Scores s[count][lanes are queries] of keys from `j` on: scale, softcap, biases, then what hides.

    `spare` has room for one tile; `slope`, if not NULL, receives tanh of the capped scores. Returns whether any
    score may have been hidden.
    """
    cdef int64_t own = p.keys - p.extra, t
    cdef Py_ssize_t width = panel.width, vectors = panel.vectors, q
    cdef bint partial = False
    cdef real* low = <real*>panel.low_here
    cdef real* high = <real*>panel.high_here
    if p.score_scale != 1:
        scale_scores(count * vectors, s, p.score_scale)
    if p.softcap != 0:
        softcap_scores(count * vectors, s, p.softcap, slope)
    if j < own:
        if p.key_bias != NULL:
            partial = True
            for t in range(count):
                add_bias(vectors, s + t * width, <const real*>p.key_bias + panel.sample * own + j + t, 1)
        if p.pair_bias.data != NULL:
            partial = True
            load_pairs(&p.pair_bias, panel, j, count, spare)
            for t in range(count):
                add_bias(vectors, s + t * width, spare + t * width, 0)
        if p.pair_keep.data != NULL:
            partial = True
            load_pairs(&p.pair_keep, panel, j, count, spare)
            for t in range(count):
                hide_flagged(vectors, s + t * width, spare + t * width, <double>p.pair_hides)
        if block_has_hidden(p, panel.sample, j, count):
            partial = True
            for t in range(count):
                if not key_exists(p, panel.sample, j + t):
                    for q in range(width):
                        s[t * width + q] = <real>(-INFINITY)
    if j < panel.all_start or j + count > panel.all_stop:
        if j < own or p.query_lengths != NULL:
            partial = True
            for q in range(width):
                low[q] = <real>max(<int64_t>0, min(panel.low[q] - j, count))
                high[q] = <real>max(<int64_t>0, min(panel.high[q] - j, count))
                if j >= own:                            # appended keys: all of them, or none for an empty row
                    low[q] = 0
                    high[q] = 0 if panel.high[q] < 0 else <real>count
            for t in range(count):
                hide_key(vectors, s + t * width, <double>t, low, high)
    return partial


cdef inline void load_pairs(const TensorView* x, const Panel* panel, int64_t j, int64_t count,
                            real* tile) noexcept nogil:
    """tile[count][lanes are queries] = x(sample, head, query, j ...)"""
    cdef Py_ssize_t q
    cdef int64_t start = (x.offsets[panel.sample] if x.offsets != NULL else panel.sample * x.batch) + j * x.column
    cdef int64_t starts[MOST_LANES]
    for q in range(panel.width):
        starts[q] = start + panel.head[q] * x.head + panel.query[q] * x.row
    load_transposed(<int>x.storage, x.data, starts, x.column, panel.width, count, tile, panel.width)


cdef inline void drop_scores(const AttentionParams* p, Panel* panel, int64_t j, int64_t count,
                             real* s) noexcept nogil:
    """Dropout of the probabilities s[count][lanes are queries], for the keys from `j` on."""
    cdef int64_t key = j + p.key_start, stop = key + count, group, t
    cdef Py_ssize_t width = panel.width
    cdef uint32_t seed_low = <uint32_t>p.seed, seed_high = <uint32_t>(p.seed >> 32)
    for group in range(key >> 3, ((stop - 1) >> 3) + 1):
        mha_philox_rows(width, <uint32_t>group, panel.draw_query, panel.draw_head, <uint32_t>p.dropout_offset,
                        seed_low, seed_high, panel.words)
        for t in range(max(group * 8, key), min(group * 8 + 8, stop)):
            drop_lanes(width, s + (t - key) * width, panel.words + ((t & 7) >> 1) * width, <int>(16 * (t & 1)),
                       <uint32_t>p.threshold, p.keep_scale)
