"""Blocks of an array in the computing type: where they lie if they can be used there, else copied."""
from libc.stdint cimport int64_t
from libc.string cimport memset
from params cimport AttentionParams, TensorView
from tile cimport (real, load_vector, load_transposed, store_transposed, all_finite, MHA_FLOAT32, MHA_FLOAT64,
                   MHA_NOWHERE, MOST_LANES)
from mask cimport Panel, block_has_hidden, key_exists


cdef struct Block:
    # element (j, d) of the block lies at data[j * row + d * column]
    void* data
    int64_t row
    int64_t column


cdef inline int native_storage(const real* kind) noexcept nogil:
    if real is float:
        return MHA_FLOAT32
    else:
        return MHA_FLOAT64


cdef inline int64_t element(const TensorView* x, Py_ssize_t n, Py_ssize_t h, int64_t i) noexcept nogil:
    return (x.offsets[n] if x.offsets != NULL else n * x.batch) + h * x.head + i * x.row


cdef inline Block key_rows(const AttentionParams* p, const TensorView* x, Py_ssize_t n, Py_ssize_t h, int64_t j,
                           int64_t count, Py_ssize_t columns, real* spare) noexcept nogil:
    """Keys or values j .. j + count of a head. Those the sample has not are zeros: they are never read."""
    cdef Block block
    cdef int64_t t
    cdef bint hidden = block_has_hidden(p, n, j, count)
    if x.storage == native_storage(spare) and not hidden:
        block.data = <real*>x.data + element(x, n, h, j)
        block.row = x.row
        block.column = x.column
        return block
    block.data = spare
    block.row = columns
    block.column = 1
    if x.column == 1 and x.row == columns and not hidden:
        load_vector(<int>x.storage, x.data, element(x, n, h, j), 1, count * columns, spare, 1)
        return block
    for t in range(count):
        if hidden and not key_exists(p, n, j + t):
            memset(spare + t * columns, 0, columns * sizeof(real))
        else:
            load_vector(<int>x.storage, x.data, element(x, n, h, j + t), x.column, columns, spare + t * columns, 1)
    return block


cdef inline void load_panel(const TensorView* x, const Panel* panel, Py_ssize_t columns, real* out) noexcept nogil:
    """out[columns][lanes are queries] = x; spare lanes are zeros, and so are rows that see nothing."""
    cdef int64_t starts[MOST_LANES]
    cdef Py_ssize_t q
    for q in range(panel.rows):
        starts[q] = element(x, panel.sample, panel.head[q], panel.query[q]) if panel.high[q] >= 0 else MHA_NOWHERE
    load_transposed(<int>x.storage, x.data, starts, x.column, panel.rows, columns, out, panel.width)


cdef inline void store_panel(const TensorView* x, const Panel* panel, Py_ssize_t columns, const real* value,
                             double factor) noexcept nogil:
    """x = factor * value[columns][lanes are queries]"""
    cdef int64_t starts[MOST_LANES]
    cdef Py_ssize_t q
    for q in range(panel.rows):
        starts[q] = element(x, panel.sample, panel.head[q], panel.query[q])
    store_transposed(<int>x.storage, x.data, starts, x.column, panel.rows, columns, value, panel.width, factor)


cdef inline Block query_rows(const TensorView* x, Py_ssize_t n, Py_ssize_t h, int64_t i, int64_t count,
                             Py_ssize_t columns, real* spare) noexcept nogil:
    """Queries i .. i + count of a head, or their output gradients."""
    cdef Block block
    cdef int64_t t
    if x.storage == native_storage(spare):
        block.data = <real*>x.data + element(x, n, h, i)
        block.row = x.row
        block.column = x.column
        return block
    block.data = spare
    block.row = columns
    block.column = 1
    for t in range(count):
        load_vector(<int>x.storage, x.data, element(x, n, h, i + t), x.column, columns, spare + t * columns, 1)
    return block


cdef inline bint block_finite(Block block, int64_t count, Py_ssize_t columns, const real* kind) noexcept nogil:
    return all_finite(<const real*>block.data, count, block.row, columns, block.column)
