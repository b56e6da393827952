"""Blocks of bfloat16 keys and values as the operands of products of pairs. See pairs.h.

A `Block` here counts 16-bit values: its element (j, d) is a pair, of neighbours along the product's sum.
"""
from libc.stdint cimport int64_t, uint16_t, uint32_t
from libc.string cimport memset
from params cimport AttentionParams, TensorView
from tile cimport MHA_TILED, pair_values, turn_pairs
from mask cimport block_has_hidden, key_exists
from storage cimport Block, element


cdef inline Block key_pairs(const AttentionParams* p, Py_ssize_t n, Py_ssize_t h, int64_t j, int64_t count,
                            char* spare) noexcept nogil:
    """Keys j .. j + count, pairs along the columns: where they lie, else copied. Those the sample has not are zeros."""
    cdef const TensorView* x = &p.key
    cdef const uint16_t* data = <const uint16_t*>x.data
    cdef uint16_t* out = <uint16_t*>spare
    cdef bint hidden = block_has_hidden(p, n, j, count)
    cdef int64_t t, d, start
    cdef Block block
    block.column = 2
    if x.column == 1 and p.head_dim % 2 == 0 and not hidden:
        block.data = <void*>(data + element(x, n, h, j))
        block.row = x.row
        return block
    block.data = spare
    block.row = (p.head_dim + 1) // 2 * 2
    for t in range(count):
        if hidden and not key_exists(p, n, j + t):
            memset(out, 0, block.row * 2)
        else:
            start = element(x, n, h, j + t)
            for d in range(p.head_dim):
                out[d] = data[start + d * x.column]
            if p.head_dim % 2 != 0:
                out[p.head_dim] = 0
        out += block.row
    return block


cdef inline Block value_pairs(const AttentionParams* p, Py_ssize_t n, Py_ssize_t h, int64_t j, int64_t count,
                              char* spare, char* turned) noexcept nogil:
    """Values j .. j + count, pairs along the keys: spare[pairs of keys][columns]; and for matrix tiles transposed."""
    cdef const TensorView* x = &p.value
    cdef const uint16_t* data = <const uint16_t*>x.data
    cdef const uint16_t* even
    cdef const uint16_t* odd
    cdef uint32_t* out = <uint32_t*>spare
    cdef bint hidden = block_has_hidden(p, n, j, count), first, second
    cdef int64_t t
    cdef Block block
    block.data = spare
    block.row = 2 * p.v_head_dim
    block.column = 2
    for t in range(0, count, 2):
        first = not hidden or key_exists(p, n, j + t)
        second = t + 1 < count and (not hidden or key_exists(p, n, j + t + 1))
        even = data + element(x, n, h, j + t)
        odd = data + element(x, n, h, j + t + 1) if second else NULL
        if first:
            pair_values(p.v_head_dim, even, odd, x.column, out)
        else:
            memset(out, 0, p.v_head_dim * 4)
            if second:
                shift_in(p.v_head_dim, odd, x.column, out)
        out += p.v_head_dim
    if MHA_TILED:
        block.data = turned
        block.row = 2
        block.column = 2 * turned_row(p.key_block)
        turn_pairs((count + 1) // 2, p.v_head_dim, <const uint32_t*>spare, <uint32_t*>turned, block.column // 2)
    return block


cdef inline Py_ssize_t turned_row(int64_t key_block) noexcept nogil:
    """Pairs of keys from one column of transposed values to the next: whole tiles."""
    return (key_block + 31) // 32 * 16


cdef inline void shift_in(int64_t count, const uint16_t* odd, int64_t stride, uint32_t* out) noexcept nogil:
    """The second halves of pairs whose first are zeros."""
    cdef int64_t d
    for d in range(count):
        out[d] = <uint32_t>odd[d * stride] << 16
