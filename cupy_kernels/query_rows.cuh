// What the kernels whose rows are queries share when they take up the probabilities again: the statistics of a warp's
// rows, the probabilities of a tile, and the gradients of its scores.
#pragma once
#include "online_softmax.cuh"

// Of one row: probabilities are exp(score - shift) * scale. A row without a key has the base +inf: all are 0.
template <int M> struct RowStatistics {
    Real base[M][2], scale[M][2], delta[M][2];
};

template <int ROWS, int M>
__device__ __forceinline__ RowStatistics<M> load_statistics(const AttentionParams &p, const Exponent &exponent,
                                                            const Panel<ROWS> &panel, int64 n, int first_row,
                                                            bool with_delta)
{
    RowStatistics<M> rows;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int r = first_row + 16 * m + 8 * h + (lane_index() >> 2);
            const int64 row = (n * p.heads + panel.head[r]) * p.queries + panel.query[r];
            const Real shift = ((const Real *)p.shift)[row];
            rows.base[m][h] = shift == -(Real)infinity() ? (Real)infinity() : exponent.base(shift);
            rows.scale[m][h] = p.row_scale ? ((const Real *)p.row_scale)[row] : (Real)1;
            rows.delta[m][h] = with_delta ? ((const Real *)p.delta)[row] : (Real)0;
        }
    return rows;
}

// s: masked scores -> probabilities.
template <int M, int N>
__device__ __forceinline__ void replay_rows(const Exponent &exponent, const RowStatistics<M> &rows, bool with_scale,
                                            Real (&s)[M][N][4])
{
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int c = 0; c < N; c++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                s[m][c][i] = softmax_replay(exponent, s[m][c][i], rows.base[m][i >> 1],
                                            with_scale ? rows.scale[m][i >> 1] : (Real)1);
}

// grad += the gradient of the returned weights of the warp's rows and keys j .. j + count; averaged ones have head stride
// 0.
template <int ROWS, int M, int N>
__device__ __forceinline__ void add_grad_weights(const AttentionParams &p, const Panel<ROWS> &panel, int64 n,
                                                 int first_row, int j, int count, Real (&grad)[M][N][4])
{
    const TensorView &x = p.grad_weights;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int r = first_row + 16 * m + 8 * h + (lane_index() >> 2);
            const int64 row = element(x, n, panel.head[r], panel.query[r]);
#pragma unroll
            for (int c = 0; c < N; c++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const int column = 8 * c + 2 * (lane_index() & 3) + e;
                    if (column < count)
                        grad[m][c][2 * h + e] +=
                            load_one(x.storage, x.data, row + (j + column) * x.column) * (Real)p.grad_weights_scale;
                }
        }
}

// grad: gradients of the weights -> gradients of the masked scores.
template <int M, int N>
__device__ __forceinline__ void score_gradients(const RowStatistics<M> &rows, const Real (&weights)[M][N][4],
                                                Real (&grad)[M][N][4])
{
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int c = 0; c < N; c++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                grad[m][c][i] = softmax_gradient(weights[m][c][i], grad[m][c][i], rows.delta[m][i >> 1]);
}

// grad: gradients of the capped scores -> those of the scores before the cap, if there is one.
template <int M, int N>
__device__ __forceinline__ void softcap_gradients(const AttentionParams &p, const Real (&slope)[M][N][4],
                                                  Real (&grad)[M][N][4])
{
    if (MASKS == ANYTHING && p.softcap != 0) {
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int c = 0; c < N; c++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    grad[m][c][i] = softcap_gradient(grad[m][c][i], slope[m][c][i]);
    }
}
