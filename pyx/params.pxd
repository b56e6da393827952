"""The one struct of numbers that a kernel receives. `mha/params.py` holds the same table; a test compares the two.

Every field is eight bytes wide, so that the two layouts cannot differ. Strides count elements. A pointer that is
not needed is NULL.
"""
from libc.stdint cimport int64_t

cdef struct TensorView:
    # element (n, h, i, d) lies at data[start(n) + h * head + i * row + d * column], where start(n) is n * batch, or
    # offsets[n] if they are given: broadcast samples need not be one stride apart
    void* data
    const int64_t* offsets
    int64_t batch
    int64_t head
    int64_t row
    int64_t column
    int64_t storage

cdef struct AttentionParams:
    # sizes; `keys` counts the `extra` appended ones at the end, which every query sees
    int64_t batch
    int64_t heads
    int64_t kv_heads
    int64_t queries
    int64_t keys
    int64_t head_dim
    int64_t v_head_dim
    int64_t extra
    double score_scale              # of scores before softcap and biases;
    double softmax_scale            # of scores by the softmax itself, where nothing comes between: one of both is 1
    double softcap                  # 0: none
    # arrays
    TensorView query
    TensorView key
    TensorView value
    TensorView output
    TensorView grad_output
    TensorView grad_query
    TensorView grad_key
    TensorView grad_value
    TensorView grad_weights
    TensorView target               # attention_weights: what is written
    TensorView pair_keep            # bool
    TensorView pair_bias
    void* lse                       # (N, H, L), natural logarithm, in the computing type
    void* shift                     # (N, H, L): probabilities are exp(score - shift) * row_scale; NULL is 1
    void* row_scale
    void* delta                     # (N, H, L), rowsum(grad_output * output) and the share of grad_weights
    # masks: query i stands at i + position + offset and sees that - left <= key <= that + right; -1 is unlimited
    int64_t left
    int64_t right
    int64_t position                # of the first query of every sample, to which `offset` adds
    const int64_t* offset           # (N,)
    const int64_t* row_low          # (L,)
    const int64_t* row_high
    const int64_t* key_lengths      # (N,)
    const int64_t* query_lengths    # (N,)
    const unsigned char* key_keep   # (N, keys - extra)
    const void* key_bias            # (N, keys - extra), in the computing type
    int64_t pair_hides              # the value of pair_keep that hides
    # dropout
    int64_t dropout                 # 0: none
    int64_t threshold               # a 16-bit draw below it is dropped
    int64_t seed
    int64_t dropout_offset
    int64_t total_heads             # the indices that dropout is drawn for are global: a shard says where it starts
    int64_t batch_start
    int64_t head_start
    int64_t query_start
    int64_t key_start
    double keep_scale               # 1 / (1 - p)
    double grad_weights_scale       # 1, or 1 / H for averaged weights
    # plan
    int64_t threads
    int64_t vectors                 # vectors in a panel
    int64_t panels                  # panels in a row block, which share the blocks of K and V
    int64_t key_block
    int64_t splits                  # attention_decode: parts of the keys
    int64_t fused                   # attention_backward: the query gradient in the same pass
    int64_t paired                  # attention_forward: products of bfloat16 pairs
    int64_t mode                    # attention_weights: what is made of the probabilities
    int64_t target_batch            # attention_weights: axes of size 1 of the target are summed over
    int64_t target_heads
    int64_t target_rows
    int64_t target_keys
    char* partials                  # attention_decode: (N, Hk, splits) partial results
    int64_t main_thread             # whether Ctrl-C is to be looked for
    char* scratch
    int64_t scratch_bytes           # of one thread

cdef struct MatrixView:
    # element (i, j) lies at data[(i / rows) * row_outer + (i % rows) * row_inner + the same for j]: samples and
    # positions, or heads and their columns, need not be one axis in memory
    void* data
    int64_t storage
    int64_t rows
    int64_t row_outer
    int64_t row_inner
    int64_t columns
    int64_t column_outer
    int64_t column_inner

cdef struct ProductParams:
    # out[m][n] = sum over k of left[m][k] * right[k][n], + bias[n] or bias[m]
    int64_t m
    int64_t n
    int64_t k
    MatrixView left
    MatrixView right
    MatrixView out
    const void* bias                # contiguous, in the storage of `right`; NULL: none
    int64_t threads
    int64_t vectors
    int64_t row_block               # rows of `out` in a work item
    int64_t panels                  # panels of columns in a work item
    int64_t k_block
    int64_t right_lies              # 0: to be packed first; 1: used where it lies; 2: packed already
    int64_t paired                  # products of bfloat16 pairs: `packed` holds pairs
    int64_t bias_by_rows            # whether the bias has a value for each row, not each column
    int64_t main_thread
    char* packed                    # `right` in panels, or room for it
    char* scratch
    int64_t scratch_bytes           # of one thread


cdef struct NormParams:
    # residual_norm: total = dropout(x) + residual, output = norm(total) * scale + bias; arrays (N, L, E), heads 1
    int64_t batch
    int64_t queries
    int64_t features
    TensorView x
    TensorView residual
    TensorView total
    TensorView output
    const void* scale               # (E,), in the computing type; NULL: 1
    const void* bias                # NULL: 0
    void* grad_scale
    void* grad_bias
    int64_t normalise
    double epsilon
    # dropout, as in AttentionParams
    int64_t dropout
    int64_t threshold
    int64_t seed
    int64_t dropout_offset
    int64_t batch_start
    int64_t query_start
    double keep_scale
    int64_t threads
    int64_t row_block               # rows in a work item
    char* partials                  # backward: (blocks, 2, E) sums
    int64_t main_thread
    char* scratch
    int64_t scratch_bytes           # of one thread


cdef inline const NormParams* checked_norm_params(const unsigned char[::1] buffer) except NULL:
    if buffer.shape[0] != <Py_ssize_t>sizeof(NormParams):
        raise ValueError(f"parameter block of {buffer.shape[0]} bytes where {sizeof(NormParams)} are expected")
    return <const NormParams*>&buffer[0]


cdef inline const ProductParams* checked_product_params(const unsigned char[::1] buffer) except NULL:
    if buffer.shape[0] != <Py_ssize_t>sizeof(ProductParams):
        raise ValueError(f"parameter block of {buffer.shape[0]} bytes where {sizeof(ProductParams)} are expected")
    return <const ProductParams*>&buffer[0]


cdef inline const AttentionParams* checked_params(const unsigned char[::1] buffer) except NULL:
    if buffer.shape[0] != <Py_ssize_t>sizeof(AttentionParams):
        raise ValueError(f"parameter block of {buffer.shape[0]} bytes where {sizeof(AttentionParams)} are expected")
    return <const AttentionParams*>&buffer[0]
