"""Attention forward for few queries against many keys, as in decoding: the keys are split over the threads.

The memory bandwidth decides here, so K and V are read once, row by row, lanes along the features. The number of
splits depends on the problem only, and the partial results are combined in their order: equal bits for any number
of threads. ("Flash-Decoding", Dao et al., 2023.)
"""
from cython.parallel cimport parallel, threadid
from libc.math cimport INFINITY
from libc.stdint cimport int64_t
from libc.string cimport memset
from params cimport AttentionParams, TensorView, checked_params
from tile cimport (real, lanes, tile_dots, tile_values, tile_product_hiding, softmax_absorb_row, multiply, all_finite,
                   exp_one, load_vector, store_vector, MHA_TILE_VECTORS)
from key_panel cimport (KeyPanel, carve_key_panel, key_panels, fill_key_panel, any_visible, mask_query_scores,
                        query_drop_factors)
from mask cimport key_exists
from storage cimport native_storage, element
from schedule cimport mha_schedule, schedule_start, keep_going, next_item, finished, carve


cdef struct DecodeScratch:
    KeyPanel panel
    char* query                     # [rows of the group][D]
    char* scores                    # [rows of the group][lanes]
    char* factor                    # dropout, the same shape
    char* spare
    char* key                       # a converted block of K, [lanes][D]
    char* value                     # and of V, [lanes][padded Dv]


cdef Py_ssize_t carve_decode(const AttentionParams* p, char* base, DecodeScratch* scratch,
                             const real* kind) noexcept nogil:
    """Lays out one thread's scratch memory and returns its size."""
    cdef char* cursor = base
    cdef Py_ssize_t width = p.vectors * lanes(kind), size = sizeof(real), rows = p.heads // p.kv_heads * p.queries
    carve_key_panel(p, &scratch.panel, &cursor, kind)
    scratch.query = carve(&cursor, rows * p.head_dim * size)
    scratch.scores = carve(&cursor, rows * width * size)
    scratch.factor = carve(&cursor, rows * width * size if p.dropout else 0)
    scratch.spare = carve(&cursor, width * size)
    scratch.key = carve(&cursor, width * p.head_dim * size)
    scratch.value = carve(&cursor, width * padded(p.v_head_dim, kind) * size)
    return cursor - base


cdef Py_ssize_t partial_size(const AttentionParams* p, const real* kind) noexcept nogil:
    """Reals of one partial result: a padded output, a maximum and a sum for each row of the group."""
    return p.heads // p.kv_heads * p.queries * (padded(p.v_head_dim, kind) + 2)


cdef const real* panel_rows(const AttentionParams* p, const TensorView* x, const KeyPanel* panel, Py_ssize_t columns,
                            Py_ssize_t padded_columns, real* spare, int64_t* row) noexcept nogil:
    """The panel's keys or values with contiguous columns: in place if they lie so, else copied and padded."""
    cdef int64_t t
    if x.storage == native_storage(spare) and x.column == 1 and columns == padded_columns and not panel.lacking:
        row[0] = x.row
        return <const real*>x.data + element(x, panel.sample, panel.kv_head, panel.first)
    row[0] = padded_columns
    for t in range(panel.count):
        memset(spare + t * padded_columns, 0, padded_columns * sizeof(real))
        if key_exists(p, panel.sample, panel.first + t):
            load_vector(<int>x.storage, x.data, element(x, panel.sample, panel.kv_head, panel.first + t), x.column,
                        columns, spare + t * padded_columns, 1)
    return spare


cdef void add_values_hiding(Py_ssize_t rows, Py_ssize_t count, Py_ssize_t columns, const real* weight, Py_ssize_t width,
                            const real* value, int64_t value_row, real* output) noexcept nogil:
    """output[rows][columns] += weight[rows][count] value[count][columns] but for terms whose weight is 0."""
    cdef Py_ssize_t tile = MHA_TILE_VECTORS * lanes(value), d = 0
    while d < columns:
        tile_product_hiding(rows, min(tile, columns - d) // lanes(value), count, weight, width, 1, value + d, value_row,
                            output + d, columns, 0)
        d += tile


cdef void decode_panel(const AttentionParams* p, DecodeScratch* scratch, real* output, real* maximum,
                       real* sum) noexcept nogil:
    """Takes the panel's keys into the running results of every row of the group."""
    cdef KeyPanel* panel = &scratch.panel
    cdef Py_ssize_t width = panel.width, group = p.heads // p.kv_heads, columns = padded(p.v_head_dim, output), g, r, d
    cdef Py_ssize_t rows = group * p.queries
    cdef int64_t key_row, value_row
    cdef const real* key = panel_rows(p, &p.key, panel, p.head_dim, p.head_dim, <real*>scratch.key, &key_row)
    cdef const real* value = panel_rows(p, &p.value, panel, p.v_head_dim, columns, <real*>scratch.value, &value_row)
    cdef real* scores = <real*>scratch.scores
    cdef real* s
    cdef real factor
    cdef bint partial = False
    tile_dots(panel.count, p.head_dim, key, key_row, rows, <const real*>scratch.query, scores, width, value)
    for g in range(group):
        s = scores + g * p.queries * width
        for r in range(p.queries):
            memset(s + r * width + panel.count, 0, (width - panel.count) * sizeof(real))
        if mask_query_scores(p, panel, panel.kv_head * group + g, 0, p.queries, s, <real*>scratch.spare, <real*>NULL):
            partial = True
        if p.dropout:
            query_drop_factors(p, panel, panel.kv_head * group + g, 0, p.queries,
                               <real*>scratch.factor + g * p.queries * width)
    for r in range(rows):
        factor = <real>softmax_absorb_row(panel.vectors, scores + r * width, p.softmax_scale, maximum + r, sum + r)
        if factor != 1:
            for d in range(columns):
                output[r * columns + d] *= factor
    if p.dropout:
        multiply(rows * width, scores, scores, <const real*>scratch.factor)
    if partial and not all_finite(value, panel.count, value_row, p.v_head_dim, 1):
        add_values_hiding(rows, panel.count, columns, scores, width, value, value_row, output)
    else:
        tile_values(columns // lanes(output), panel.count, value, value_row, rows, scores, width, output,
                    key + panel.count * key_row)


cdef void decode_split(const AttentionParams* p, DecodeScratch* scratch, int64_t item, mha_schedule* schedule,
                       int thread, const real* kind) noexcept nogil:
    """One work item: one part of the keys of one key head."""
    cdef Py_ssize_t rows = p.heads // p.kv_heads * p.queries, columns = padded(p.v_head_dim, kind), group, r
    cdef int64_t split = item % p.splits, kv_head = item // p.splits % p.kv_heads, n = item // p.splits // p.kv_heads
    cdef int64_t panels = key_panels(p, p.vectors * lanes(kind)), index, i
    cdef real* output = <real*>p.partials + item * partial_size(p, kind)
    cdef real* maximum = output + rows * columns
    cdef real* sum = maximum + rows
    cdef real* query = <real*>scratch.query
    group = p.heads // p.kv_heads
    memset(output, 0, rows * columns * sizeof(real))
    for r in range(rows):
        maximum[r] = <real>(-INFINITY)
        sum[r] = 0
        i = r % p.queries
        load_vector(<int>p.query.storage, p.query.data, element(&p.query, n, kv_head * group + r // p.queries, i),
                    p.query.column, p.head_dim, query + r * p.head_dim, 1)
    for index in range(panels * split // p.splits, panels * (split + 1) // p.splits):
        if not keep_going(schedule, thread):
            return
        fill_key_panel(p, &scratch.panel, n, kv_head, index, kind)
        if any_visible(&scratch.panel, 0, p.queries):
            decode_panel(p, scratch, output, maximum, sum)


cdef void combine_splits(const AttentionParams* p, int64_t item, const real* kind) noexcept nogil:
    """Merges the partial results of one key head, in the order of the splits, into those of the first."""
    cdef Py_ssize_t rows = p.heads // p.kv_heads * p.queries, columns = padded(p.v_head_dim, kind), r, d
    cdef Py_ssize_t size = partial_size(p, kind), group = p.heads // p.kv_heads
    cdef int64_t n = item // p.kv_heads, kv_head = item % p.kv_heads, split, head
    cdef real* first = <real*>p.partials + item * p.splits * size
    cdef real* part
    cdef real top, total, factor, own
    for r in range(rows):
        top = <real>(-INFINITY)
        total = 0
        for split in range(p.splits):
            part = first + split * size
            if part[rows * columns + r] > top or part[rows * columns + r] != part[rows * columns + r]:
                top = part[rows * columns + r]
        for split in range(p.splits):
            part = first + split * size
            own = part[rows * columns + r]
            factor = exp_one(own - top) if own != <real>(-INFINITY) else 0
            total += part[rows * columns + rows + r] * factor
            for d in range(columns):
                if split == 0:
                    first[r * columns + d] *= factor
                else:
                    first[r * columns + d] += part[r * columns + d] * factor
        head = kv_head * group + r // p.queries
        store_statistics(p, (n * p.heads + head) * p.queries + r % p.queries, top, total)
        store_vector(<int>p.output.storage, p.output.data, element(&p.output, n, head, r % p.queries), p.output.column,
                     p.v_head_dim, first + r * columns, 1, 1 / total if total != 0 else 0)


cdef void decode_worker(const AttentionParams* p, bint combine, mha_schedule* schedule, int thread,
                        const real* kind) noexcept nogil:
    cdef DecodeScratch scratch
    cdef int64_t item
    carve_decode(p, p.scratch + thread * p.scratch_bytes, &scratch, kind)
    item = next_item(schedule, thread, -1)
    while item >= 0:
        if combine:
            combine_splits(p, item, kind)
        else:
            decode_split(p, &scratch, item, schedule, thread, kind)
        item = next_item(schedule, thread, item)


cdef int run_decode(const AttentionParams* p, const real* kind) except -1:
    cdef mha_schedule schedule, combining
    cdef int team
    schedule_start(&schedule, p.batch * p.kv_heads * p.splits, <int>p.main_thread)
    with nogil, parallel(num_threads=<int>p.threads):
        decode_worker(p, False, &schedule, threadid(), kind)
    team = finished(&schedule)
    schedule_start(&combining, p.batch * p.kv_heads, <int>p.main_thread)
    with nogil:         # a few rows: not worth waking the team
        decode_worker(p, True, &combining, 0, kind)
    finished(&combining)
    return team


def attention_decode_scratch(const unsigned char[::1] params, bint double_precision):
    """Bytes of scratch memory that one thread needs."""
    cdef DecodeScratch scratch
    cdef const AttentionParams* p = checked_params(params)
    if double_precision:
        return carve_decode(p, NULL, &scratch, <const double*>NULL)
    return carve_decode(p, NULL, &scratch, <const float*>NULL)


def attention_decode_partials(const unsigned char[::1] params, bint double_precision):
    """Bytes that the partial results of all splits need."""
    cdef const AttentionParams* p = checked_params(params)
    cdef Py_ssize_t items = p.batch * p.kv_heads * p.splits
    if double_precision:
        return items * partial_size(p, <const double*>NULL) * sizeof(double)
    return items * partial_size(p, <const float*>NULL) * sizeof(float)


def attention_decode(const unsigned char[::1] params, bint double_precision):
    """Writes output and log-sum-exp; returns the size of the team of threads."""
    cdef const AttentionParams* p = checked_params(params)
    if double_precision:
        return run_decode(p, <const double*>NULL)
    return run_decode(p, <const float*>NULL)
