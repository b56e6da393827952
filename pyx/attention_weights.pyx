"""What needs the probabilities themselves, recomputed tile by tile.

Five modes: the weights written per head; averaged over the heads in (N, L, S) memory; the gradient of an additive
mask, summed over the axes that the mask broadcasts; the share that a gradient of the returned weights has in
delta; and a correction for rows whose scores are so large that the log-sum-exp cannot hold the sum beside the maximum
(finite minima as mask values). An item owns its part of the target and sums in a fixed order.
"""
from cython.parallel cimport parallel, threadid
from libc.stdint cimport int64_t
from libc.string cimport memset
from params cimport AttentionParams, checked_params
from tile cimport real, lanes, tile_product, softmax_replay, store_transposed, MOST_LANES
from mask cimport Panel, fill_panel, next_block, mask_scores, drop_scores, load_pairs
from storage cimport Block, key_rows, element
from schedule cimport mha_schedule, schedule_start, keep_going, next_item, finished, carve

cdef enum:
    MODE_WEIGHTS = 0                # target (N, H, L, T)
    MODE_AVERAGE = 1                # target (N, 1, L, T)
    MODE_MASK_GRADIENT = 2          # target (1 | N, 1 | H, 1 | L, S)
    MODE_DELTA = 3                  # delta += rowsum(weights * grad_weights)
    MODE_ROW_SCALE = 4              # row_scale = 1 / rowsum(exp(score - shift))
    KEY_CHUNK = 256                 # keys of the target that an item owns


cdef struct WeightsScratch:
    QueryScratch rows
    char* sum                       # [KEY_CHUNK][lanes]


cdef Py_ssize_t carve_weights(const AttentionParams* p, char* base, WeightsScratch* scratch,
                              const real* kind) noexcept nogil:
    """Lays out one thread's scratch memory and returns its size."""
    cdef Py_ssize_t used = carve_query(p, base, &scratch.rows, kind)
    cdef char* cursor = base + used
    scratch.sum = carve(&cursor, KEY_CHUNK * p.vectors * lanes(kind) * sizeof(real))
    return cursor - base


cdef void weights_tile(const AttentionParams* p, WeightsScratch* scratch, int64_t j, int64_t count,
                       const real* kind) noexcept nogil:
    """probability[count][lanes]: the weights, after dropout."""
    cdef Panel* panel = &scratch.rows.panel
    cdef real* probability = <real*>scratch.rows.probability
    cdef Block key = key_rows(p, &p.key, panel.sample, panel.kv_head, j, count, p.head_dim, <real*>scratch.rows.key)
    tile_product(count, panel.vectors, p.head_dim, <const real*>key.data, key.row, key.column,
                 <const real*>scratch.rows.query, panel.width, probability, panel.width, 0)
    mask_scores(p, panel, j, count, probability, <real*>scratch.rows.spare, <real*>NULL)
    softmax_replay(count, panel.vectors, probability, p.softmax_scale, <const real*>scratch.rows.shift,
                   <const real*>scratch.rows.row_scale if p.row_scale != NULL and p.mode != MODE_ROW_SCALE else NULL)
    if p.dropout and p.mode != MODE_ROW_SCALE:
        drop_scores(p, panel, j, count, probability)


cdef void gradient_tile(const AttentionParams* p, WeightsScratch* scratch, int64_t j, int64_t count,
                        const real* kind) noexcept nogil:
    """gradient[count][lanes] of the masked scores."""
    cdef Panel* panel = &scratch.rows.panel
    cdef Block key = key_rows(p, &p.key, panel.sample, panel.kv_head, j, count, p.head_dim, <real*>scratch.rows.key)
    cdef Block value = key_rows(p, &p.value, panel.sample, panel.kv_head, j, count, p.v_head_dim,
                                <real*>scratch.rows.value)
    score_gradients(p, &scratch.rows, j, count, key, value, kind)


cdef void add_rows(const AttentionParams* p, WeightsScratch* scratch, Py_ssize_t n, Py_ssize_t head, int64_t i,
                   int64_t rows, Py_ssize_t width, int64_t start, int64_t stop, const real* kind) noexcept nogil:
    """Adds queries i .. i + rows of one head, keys start .. stop, to the item's sum."""
    cdef Panel* panel = &scratch.rows.panel
    cdef Py_ssize_t group = p.heads // p.kv_heads, lane
    cdef real* tile
    cdef real* sum = <real*>scratch.sum
    cdef real factor = 1 / <real>p.heads if p.mode == MODE_AVERAGE else 1
    cdef int64_t j = start, count = 0, t
    fill_panel(p, panel, n, head // group, (head % group) * p.queries + i, rows, kind)
    load_query_panel(p, &scratch.rows, p.mode == MODE_MASK_GRADIENT, kind)
    while True:
        j = next_block(p, panel, j, &count)
        if j < 0 or j >= stop:
            return
        count = min(count, stop - j)
        if p.mode == MODE_MASK_GRADIENT:
            gradient_tile(p, scratch, j, count, kind)
            tile = <real*>scratch.rows.gradient
        else:
            weights_tile(p, scratch, j, count, kind)
            tile = <real*>scratch.rows.probability
        for t in range(count):
            for lane in range(panel.rows):
                sum[(j - start + t) * width + lane] += tile[t * panel.width + lane] * factor
        j += count


cdef void store_sum(const AttentionParams* p, WeightsScratch* scratch, Py_ssize_t n, Py_ssize_t head, int64_t i,
                    int64_t rows, Py_ssize_t width, int64_t start, int64_t count, const real* kind) noexcept nogil:
    cdef real* sum = <real*>scratch.sum
    cdef int64_t starts[MOST_LANES]
    cdef int64_t q, t
    if p.target_rows == 1 and p.queries != 1:           # a mask shared by all queries
        for t in range(count):
            for q in range(1, width):
                sum[t * width] += sum[t * width + q]
    if p.target_rows != p.queries:
        rows = 1
    for q in range(rows):
        starts[q] = element(&p.target, n, head, i + q) + start * p.target.column
    store_transposed(<int>p.target.storage, p.target.data, starts, p.target.column, rows, count, sum, width, 1)


cdef void weights_item(const AttentionParams* p, WeightsScratch* scratch, int64_t item, mha_schedule* schedule,
                       int thread, const real* kind) noexcept nogil:
    """One part of the target: some rows (all of them if they are summed over), KEY_CHUNK keys."""
    cdef int64_t width = p.vectors * lanes(kind), chunks = (p.target_keys + KEY_CHUNK - 1) // KEY_CHUNK
    cdef int64_t blocks = (p.target_rows + width - 1) // width, start, stop, first, last, i, n, head
    cdef int64_t tn, th, rows
    start = item % chunks * KEY_CHUNK
    stop = min(start + KEY_CHUNK, p.target_keys)
    item //= chunks
    first = item % blocks * width
    last = min(first + width, p.queries) if p.target_rows == p.queries else p.queries
    item //= blocks
    th = item % p.target_heads
    tn = item // p.target_heads
    rows = min(width, last - first)
    width = (rows + lanes(kind) - 1) // lanes(kind) * lanes(kind)
    memset(scratch.sum, 0, KEY_CHUNK * p.vectors * lanes(kind) * sizeof(real))
    for n in range(tn if p.target_batch == p.batch else 0, tn + 1 if p.target_batch == p.batch else p.batch):
        for head in range(th if p.target_heads == p.heads else 0, th + 1 if p.target_heads == p.heads else p.heads):
            i = first
            while i < last:
                if not keep_going(schedule, thread):
                    return
                add_rows(p, scratch, n, head, i, min(rows, last - i), width, start, stop, kind)
                i += rows
    store_sum(p, scratch, tn, th, first, rows, width, start, stop - start, kind)


cdef void row_item(const AttentionParams* p, WeightsScratch* scratch, int64_t item, mha_schedule* schedule,
                   int thread, const real* kind) noexcept nogil:
    """MODE_DELTA and MODE_ROW_SCALE for one panel of queries."""
    cdef Panel* panel = &scratch.rows.panel
    cdef int64_t width = p.vectors * lanes(kind), blocks = (p.queries + width - 1) // width, j = 0, count = 0, t
    cdef int64_t i = item % blocks * width, head = item // blocks % p.heads, n = item // blocks // p.heads, row
    cdef Py_ssize_t group = p.heads // p.kv_heads, q
    cdef real* sum = <real*>scratch.sum
    cdef real* tile = <real*>scratch.rows.probability
    cdef real* grad = <real*>scratch.rows.spare
    fill_panel(p, panel, n, head // group, (head % group) * p.queries + i, min(width, p.queries - i), kind)
    load_query_panel(p, &scratch.rows, False, kind)
    memset(sum, 0, panel.width * sizeof(real))
    while True:
        j = next_block(p, panel, j, &count)
        if j < 0 or not keep_going(schedule, thread):
            break
        weights_tile(p, scratch, j, count, kind)
        if p.mode == MODE_DELTA:
            load_pairs(&p.grad_weights, panel, j, count, grad)
        for t in range(count):
            for q in range(panel.width):
                if tile[t * panel.width + q] != 0:
                    sum[q] += tile[t * panel.width + q] * (grad[t * panel.width + q] if p.mode == MODE_DELTA else 1)
        j += count
    for q in range(panel.rows):
        row = (n * p.heads + head) * p.queries + i + q
        if p.mode == MODE_DELTA:
            (<real*>p.delta)[row] += sum[q] * <real>p.grad_weights_scale
        else:
            (<real*>p.row_scale)[row] = 1 / sum[q] if sum[q] != 0 else 0


cdef void weights_worker(const AttentionParams* p, mha_schedule* schedule, int thread, const real* kind) noexcept nogil:
    cdef WeightsScratch scratch
    cdef int64_t item
    carve_weights(p, p.scratch + thread * p.scratch_bytes, &scratch, kind)
    item = next_item(schedule, thread, -1)
    while item >= 0:
        if p.mode >= MODE_DELTA:
            row_item(p, &scratch, item, schedule, thread, kind)
        else:
            weights_item(p, &scratch, item, schedule, thread, kind)
        item = next_item(schedule, thread, item)


cdef int run_weights(const AttentionParams* p, const real* kind) except -1:
    cdef mha_schedule schedule
    cdef int64_t width = p.vectors * lanes(kind), chunks = (p.target_keys + KEY_CHUNK - 1) // KEY_CHUNK, total
    if p.mode >= MODE_DELTA:
        total = p.batch * p.heads * ((p.queries + width - 1) // width)
    else:
        total = p.target_batch * p.target_heads * ((p.target_rows + width - 1) // width) * chunks
    schedule_start(&schedule, total, <int>p.main_thread)
    with nogil, parallel(num_threads=<int>p.threads):
        weights_worker(p, &schedule, threadid(), kind)
    return finished(&schedule)


def attention_weights_scratch(const unsigned char[::1] params, bint double_precision):
    """Bytes of scratch memory that one thread needs."""
    cdef WeightsScratch scratch
    cdef const AttentionParams* p = checked_params(params)
    if double_precision:
        return carve_weights(p, NULL, &scratch, <const double*>NULL)
    return carve_weights(p, NULL, &scratch, <const float*>NULL)


def attention_weights(const unsigned char[::1] params, bint double_precision):
    """Writes the target of the mode; returns the size of the team of threads."""
    cdef const AttentionParams* p = checked_params(params)
    if double_precision:
        return run_weights(p, <const double*>NULL)
    return run_weights(p, <const float*>NULL)
