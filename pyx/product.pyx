"""Matrix products for the projections, on the register tiles and the threads of the attention kernels.

A second thread pool beside ours would make both slow: alternating with a BLAS costs small layers a factor of 60.
`right` is packed into panels once, in parallel; then every item computes a block of `out`. The sums over k are taken
in blocks whose size depends on the problem only, each by one thread: equal bits for any number of threads.
"""
from cython.parallel cimport parallel, threadid
from libc.stdint cimport int64_t, uint16_t
from libc.string cimport memset
from params cimport MatrixView, ProductParams, checked_product_params
from tile cimport (real, lanes, tile_product, pair_product, pair_rows, load_vector, store_vector, load_transposed,
                   mha_tiles_begin, mha_tiles_end, MHA_BFLOAT16, MOST_LANES)
from storage cimport native_storage
from schedule cimport (mha_schedule, schedule_start, schedule_stop, schedule_stopped, wait_for_all, keep_going,
                       next_item, finished, carve)

cdef enum:
    TO_BE_PACKED = 0
    IN_PLACE = 1

cdef enum:
    PACKED_ROWS = 64                # of `right` are on their way to pairs at a time

cdef struct ProductScratch:
    char* left                      # a packed block of `left`: [row_block][k_block], or transposed
    char* left_pairs                # the same in pairs along k
    char* right                     # rows of `right` that become pairs, [PACKED_ROWS][lanes]
    char* out                       # [panels][row_block][lanes]
    char* bias                      # [lanes]


cdef Py_ssize_t carve_product(const ProductParams* p, char* base, ProductScratch* scratch,
                              const real* kind) noexcept nogil:
    """Lays out one thread's scratch memory and returns its size."""
    cdef char* cursor = base
    cdef Py_ssize_t width = p.vectors * lanes(kind), size = sizeof(real)
    scratch.left = carve(&cursor, p.row_block * p.k_block * size)
    scratch.left_pairs = carve(&cursor, p.row_block * (p.k_block + 1) // 2 * size if p.paired else 0)
    scratch.right = carve(&cursor, PACKED_ROWS * width * size if p.paired else 0)
    scratch.out = carve(&cursor, p.panels * p.row_block * width * size)
    scratch.bias = carve(&cursor, width * size)
    return cursor - base


cdef inline int64_t matrix_row(const MatrixView* x, int64_t i) noexcept nogil:
    return i // x.rows * x.row_outer + i % x.rows * x.row_inner


cdef inline int64_t matrix_column(const MatrixView* x, int64_t j) noexcept nogil:
    return j // x.columns * x.column_outer + j % x.columns * x.column_inner


cdef void load_row(const MatrixView* x, int64_t i, int64_t j, int64_t count, real* out,
                   Py_ssize_t out_stride) noexcept nogil:
    """out[t * out_stride] = x[i][j + t], run by run where the columns are split."""
    cdef int64_t start = matrix_row(x, i), done = 0, run
    while done < count:
        run = min(count - done, x.columns - (j + done) % x.columns)
        load_vector(<int>x.storage, x.data, start + matrix_column(x, j + done), x.column_inner, run,
                    out + done * out_stride, out_stride)
        done += run


cdef void load_column(const MatrixView* x, int64_t i, int64_t j, int64_t count, real* out,
                      Py_ssize_t out_stride) noexcept nogil:
    """out[t * out_stride] = x[i + t][j]"""
    cdef int64_t start = matrix_column(x, j), done = 0, run
    while done < count:
        run = min(count - done, x.rows - (i + done) % x.rows)
        load_vector(<int>x.storage, x.data, start + matrix_row(x, i + done), x.row_inner, run,
                    out + done * out_stride, out_stride)
        done += run


cdef void store_row(const MatrixView* x, int64_t i, int64_t j, int64_t count, const real* value) noexcept nogil:
    cdef int64_t start = matrix_row(x, i), done = 0, run
    while done < count:
        run = min(count - done, x.columns - (j + done) % x.columns)
        store_vector(<int>x.storage, x.data, start + matrix_column(x, j + done), x.column_inner, run, value + done, 1,
                     1)
        done += run


cdef void load_right(const ProductParams* p, int64_t k, int64_t rows, int64_t first, int64_t count, real* out,
                     Py_ssize_t width) noexcept nogil:
    """out[rows][width] = right[k : k + rows][first : first + count], along whichever axis is contiguous in memory."""
    cdef int64_t starts[MOST_LANES]
    cdef int64_t t, run, last = k + rows
    if p.right.column_inner == 1 or p.right.row_inner != 1:
        for t in range(rows):
            if count < width:
                memset(out + t * width, 0, width * sizeof(real))
            load_row(&p.right, k + t, first, count, out + t * width, 1)
        return
    while k < last:
        run = min(last - k, p.right.rows - k % p.right.rows)
        for t in range(count):
            starts[t] = matrix_row(&p.right, k) + matrix_column(&p.right, first + t)
        load_transposed(<int>p.right.storage, p.right.data, starts, p.right.row_inner, count, run, out, width)
        out += run * width
        k += run


cdef void pack_panel(const ProductParams* p, ProductScratch* scratch, int64_t panel, const real* kind) noexcept nogil:
    """packed[panel][k][lanes] = right, spare lanes zeros; or [pairs of k][lanes]."""
    cdef int64_t width = p.vectors * lanes(kind), first = panel * width, count = min(width, p.n - first), k = 0, rows
    if real is float and p.paired:
        while k < p.k:
            rows = min(p.k - k, PACKED_ROWS)
            load_right(p, k, rows, first, count, <float*>scratch.right, width)
            pair_rows(rows, width, <float*>scratch.right, packed_panel(p, panel, k, kind))
            k += rows
    else:
        load_right(p, 0, p.k, first, count, packed_panel(p, panel, 0, kind), width)


cdef inline real* packed_panel(const ProductParams* p, int64_t panel, int64_t k, const real* kind) noexcept nogil:
    """Where row k of a packed panel begins; pairs take half the rows."""
    cdef int64_t width = p.vectors * lanes(kind)
    if p.paired:
        return <real*>p.packed + (panel * ((p.k + 1) // 2) + k // 2) * width
    return <real*>p.packed + (panel * p.k + k) * width


cdef const real* left_block(const ProductParams* p, ProductScratch* scratch, int64_t i, int64_t rows, int64_t k,
                            int64_t count, Py_ssize_t* row, Py_ssize_t* column, const real* kind) noexcept nogil:
    """left[i : i + rows][k : k + count]: where it lies if two strides describe it, else packed."""
    cdef const MatrixView* x = &p.left
    cdef real* out = <real*>scratch.left
    cdef int64_t t
    if (x.storage == native_storage(kind) and i // x.rows == (i + rows - 1) // x.rows
            and k // x.columns == (k + count - 1) // x.columns and x.column_inner == 1):
        row[0] = x.row_inner
        column[0] = 1
        return <const real*>x.data + matrix_row(x, i) + matrix_column(x, k)
    if x.column_inner == 1 or x.row_inner != 1:
        row[0] = count
        column[0] = 1
        for t in range(rows):
            load_row(x, i + t, k, count, out + t * count, 1)
    else:
        row[0] = 1
        column[0] = rows
        for t in range(count):
            load_column(x, i, k + t, rows, out + t * rows, 1)
    return out


cdef const uint16_t* left_pairs(const ProductParams* p, ProductScratch* scratch, int64_t i, int64_t rows, int64_t k,
                                int64_t count, Py_ssize_t* row, Py_ssize_t* column) noexcept nogil:
    """The same block in pairs along k: where it lies if they are neighbours, else packed. Strides count 16 bits."""
    cdef const MatrixView* x = &p.left
    cdef uint16_t* out = <uint16_t*>scratch.left_pairs
    cdef const float* block
    cdef int64_t t, even = (count + 1) // 2 * 2
    column[0] = 2
    if (x.storage == MHA_BFLOAT16 and i // x.rows == (i + rows - 1) // x.rows and count == even
            and k // x.columns == (k + count - 1) // x.columns and x.column_inner == 1):
        row[0] = x.row_inner
        return <const uint16_t*>x.data + matrix_row(x, i) + matrix_column(x, k)
    block = left_block(p, scratch, i, rows, k, count, row, column, <const float*>NULL)
    if column[0] == 1:
        for t in range(rows):
            out[t * even + even - 1] = 0
            store_vector(MHA_BFLOAT16, out, t * even, 1, count, block + t * row[0], 1, 1)
        row[0] = even
        column[0] = 2
    else:
        pair_rows(count, rows, block, <float*>out)
        row[0] = 2
        column[0] = 2 * rows
    return out


cdef real* out_block(const ProductParams* p, ProductScratch* scratch, int64_t i, int64_t rows, int64_t panel,
                     int64_t place, Py_ssize_t* row, const real* kind) noexcept nogil:
    """Where the sums of a panel are made: in `out` itself if it has the rows of a panel, else in scratch memory."""
    cdef const MatrixView* x = &p.out
    cdef int64_t width = p.vectors * lanes(kind), j = panel * width
    if (x.storage == native_storage(kind) and x.column_inner == 1 and i // x.rows == (i + rows - 1) // x.rows
            and j + width <= p.n and j // x.columns == (j + width - 1) // x.columns):
        row[0] = x.row_inner
        return <real*>x.data + matrix_row(x, i) + matrix_column(x, j)
    row[0] = width
    return <real*>scratch.out + place * p.row_block * width


cdef void product_item(const ProductParams* p, ProductScratch* scratch, int64_t i, int64_t first_panel,
                       mha_schedule* schedule, int thread, const real* kind) noexcept nogil:
    """out[i : i + row_block][the item's panels]"""
    cdef int64_t width = p.vectors * lanes(kind), rows = min(p.row_block, p.m - i), k = 0, count, panel, t, columns
    cdef int64_t last = min(first_panel + p.panels, (p.n + width - 1) // width)
    cdef Py_ssize_t row = 0, column = 0, out_row = 0, stride, vectors
    cdef bint in_scratch
    cdef real* out
    cdef real* bias = <real*>scratch.bias
    cdef const real* left = NULL
    cdef const real* right
    cdef const uint16_t* pairs = NULL
    while k < p.k:
        if not keep_going(schedule, thread):
            return
        count = min(p.k_block, p.k - k)
        if p.paired:
            pairs = left_pairs(p, scratch, i, rows, k, count, &row, &column)
            mha_tiles_begin()
        else:
            left = left_block(p, scratch, i, rows, k, count, &row, &column, kind)
        for panel in range(first_panel, last):
            vectors = (min(width, p.n - panel * width) + lanes(kind) - 1) // lanes(kind)
            if p.right_lies == IN_PLACE:
                right = <const real*>p.right.data + k * p.right.row_inner + panel * width
                stride = p.right.row_inner
            else:
                right = packed_panel(p, panel, k, kind)
                stride = width
            out = out_block(p, scratch, i, rows, panel, panel - first_panel, &out_row, kind)
            if real is float and p.paired:
                pair_product(rows, vectors, (count + 1) // 2, pairs, row, column, right, stride, out, out_row, k > 0)
            else:
                tile_product(rows, vectors, count, left, row, column, right, stride, out, out_row, k > 0)
        if p.paired:
            mha_tiles_end()
        k += count
    for panel in range(first_panel, last):
        columns = min(width, p.n - panel * width)
        out = out_block(p, scratch, i, rows, panel, panel - first_panel, &out_row, kind)
        in_scratch = out == <real*>scratch.out + (panel - first_panel) * p.row_block * width
        if p.bias != NULL and not p.bias_by_rows:
            load_vector(<int>p.right.storage, p.bias, panel * width, 1, columns, bias, 1)
        for t in range(rows):
            if p.k == 0:
                memset(out + t * out_row, 0, columns * sizeof(real))
            if p.bias != NULL:
                if p.bias_by_rows:
                    load_vector(<int>p.right.storage, p.bias, i + t, 0, columns, bias, 1)
                for k in range(columns):
                    out[t * out_row + k] += bias[k]
            if in_scratch:
                store_row(&p.out, i + t, panel * width, columns, out + t * out_row)


cdef void product_worker(const ProductParams* p, mha_schedule* packing, mha_schedule* schedule, int thread,
                         const real* kind) noexcept nogil:
    """Both phases in one parallel region: waking a team twice would cost a small product more than its work."""
    cdef ProductScratch scratch
    cdef int64_t item, width = p.vectors * lanes(kind), groups
    groups = ((p.n + width - 1) // width + p.panels - 1) // p.panels
    carve_product(p, p.scratch + thread * p.scratch_bytes, &scratch, kind)
    item = next_item(packing, thread, -1)
    while item >= 0:
        pack_panel(p, &scratch, item, kind)
        item = next_item(packing, thread, item)
    wait_for_all(packing, thread)
    if schedule_stopped(packing):
        schedule_stop(schedule)
    item = next_item(schedule, thread, -1)
    while item >= 0:
        product_item(p, &scratch, item // groups * p.row_block, item % groups * p.panels, schedule, thread, kind)
        item = next_item(schedule, thread, item)


cdef int run_product(const ProductParams* p, const real* kind) except -1:
    cdef mha_schedule packing, schedule
    cdef int64_t width = p.vectors * lanes(kind), panels = (p.n + width - 1) // width
    schedule_start(&packing, panels if p.right_lies == TO_BE_PACKED else 0, <int>p.main_thread)
    schedule_start(&schedule, (p.m + p.row_block - 1) // p.row_block * ((panels + p.panels - 1) // p.panels),
                   <int>p.main_thread)
    with nogil, parallel(num_threads=<int>p.threads):
        product_worker(p, &packing, &schedule, threadid(), kind)
    return finished(&schedule)


def product_scratch(const unsigned char[::1] params, bint double_precision):
    """Bytes of scratch memory that one thread needs."""
    cdef ProductScratch scratch
    cdef const ProductParams* p = checked_product_params(params)
    if double_precision:
        return carve_product(p, NULL, &scratch, <const double*>NULL)
    return carve_product(p, NULL, &scratch, <const float*>NULL)


def product(const unsigned char[::1] params, bint double_precision):
    """Writes out = left @ right + bias, with m = 0 only `right` in panels; returns the size of the team of threads."""
    cdef const ProductParams* p = checked_product_params(params)
    if double_precision:
        return run_product(p, <const double*>NULL)
    return run_product(p, <const float*>NULL)
