// The one struct of numbers that a kernel receives, the twin of pyx/params.pxd: the same fields in the same order, so
// that mha/params.py fills both. Every field is eight bytes wide. A pointer that is not needed is NULL.
#pragma once

typedef long long int64;

struct TensorView {
    // element (n, h, i, d) lies at data[start(n) + h * head + i * row + d * column], where start(n) is n * batch, or
    // offsets[n] if they are given: broadcast samples need not be one stride apart
    void *data;
    const int64 *offsets;
    int64 batch;
    int64 head;
    int64 row;
    int64 column;
    int64 storage;
};

struct AttentionParams {
    // sizes; `keys` counts the `extra` appended ones at the end, which every query sees
    int64 batch;
    int64 heads;
    int64 kv_heads;
    int64 queries;
    int64 keys;
    int64 head_dim;
    int64 v_head_dim;
    int64 extra;
    double score_scale;
    double softmax_scale; // 1: on the GPU it is score_scale that the softmax applies
    double softcap;       // 0: none
    // arrays
    TensorView query;
    TensorView key;
    TensorView value;
    TensorView output;
    TensorView grad_output;
    TensorView grad_query;
    TensorView grad_key;
    TensorView grad_value;
    TensorView grad_weights;
    TensorView target;    // attention_weights: what is written
    TensorView pair_keep; // bool
    TensorView pair_bias;
    void *lse;   // (N, H, L), natural logarithm, in the computing type
    void *shift; // (N, H, L): probabilities are exp(score - shift) * row_scale; NULL is 1
    void *row_scale;
    void *delta; // (N, H, L), rowsum(grad_output * output) and the share of grad_weights
    // masks: query i stands at i + position + offset and sees that - left <= key <= that + right; -1 is unlimited
    int64 left;
    int64 right;
    int64 position;       // of the first query of every sample, to which `offset` adds
    const int64 *offset;  // (N,)
    const int64 *row_low; // (L,)
    const int64 *row_high;
    const int64 *key_lengths;      // (N,)
    const int64 *query_lengths;    // (N,)
    const unsigned char *key_keep; // (N, keys - extra)
    const void *key_bias;          // (N, keys - extra), in the computing type
    int64 pair_hides;              // the value of pair_keep that hides
    // dropout
    int64 dropout;   // 0: none
    int64 threshold; // a 16-bit draw below it is dropped
    int64 seed;
    int64 dropout_offset;
    int64 total_heads; // the indices that dropout is drawn for are global: a shard says where it starts
    int64 batch_start;
    int64 head_start;
    int64 query_start;
    int64 key_start;
    double keep_scale;         // 1 / (1 - p)
    double grad_weights_scale; // 1, or 1 / H for averaged weights
    // plan; the GPU's tile sizes are compiled in, and threads, vectors, panels, key_block, fused
    // and paired mean nothing here
    int64 threads;
    int64 vectors;
    int64 panels;
    int64 key_block;
    int64 splits; // attention_decode: parts of the keys
    int64 fused;
    int64 paired;
    int64 mode;         // attention_weights: what is made of the probabilities
    int64 target_batch; // attention_weights: axes of size 1 of the target are summed over
    int64 target_heads;
    int64 target_rows;
    int64 target_keys;
    char *partials; // attention_decode: (N, Hk, splits) partial results
    int64 main_thread;
    char *scratch;
    int64 scratch_bytes;
};

struct NormParams {
    // residual_norm: total = dropout(x) + residual, output = norm(total) * scale + bias; arrays (N, L, E), heads 1
    int64 batch;
    int64 queries;
    int64 features;
    TensorView x;
    TensorView residual;
    TensorView total;
    TensorView output;
    const void *scale; // (E,), in the computing type; NULL: 1
    const void *bias;  // NULL: 0
    void *grad_scale;
    void *grad_bias;
    int64 normalise;
    double epsilon;
    // dropout, as in AttentionParams
    int64 dropout;
    int64 threshold;
    int64 seed;
    int64 dropout_offset;
    int64 batch_start;
    int64 query_start;
    double keep_scale;
    int64 threads;
    int64 row_block; // rows in a work item
    char *partials;  // backward: (blocks, 2, E) sums
    int64 main_thread;
    char *scratch;
    int64 scratch_bytes;
};
