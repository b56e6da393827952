// Dropout, the residual link and layer norm of a layer's output, forward and backward.
//
// In the backward a team of threads owns a block of rows and adds their shares of the gradients of scale and bias to
// sums of its own; another kernel adds those in their order. The number of blocks depends on the problem alone: equal
// bits on every device.
#include "norm.cuh"

// Of row i of sample n, on its way into the norm.
struct TotalRow {
    const NormParams &p;
    const Stored *x, *residual;

    __device__ __forceinline__ TotalRow(const NormParams &p, int64 n, int64 i)
        : p(p), x((const Stored *)p.x.data + element(p.x, n, 0, i)),
          residual(p.residual.data ? (const Stored *)p.residual.data + element(p.residual, n, 0, i) : nullptr)
    {
    }
    __device__ __forceinline__ Real at(int64 e, bool kept) const
    {
        Real value = to_real(x[e * p.x.column]);
        if (p.dropout)
            value = kept ? value * (Real)p.keep_scale : 0;
        return residual ? value + to_real(residual[e * p.residual.column]) : value;
    }
};

__device__ __forceinline__ void store_feature(const TensorView &x, int64 row, int64 e, Real value)
{
    to_stored(((Stored *)x.data)[row + e * x.column], value);
}

// total = dropout(x) + residual; output = norm(total) * scale + bias
KERNEL(THREADS) residual_norm(const __grid_constant__ NormParams p)
{
    const int64 row = (int64)blockIdx.x * TEAMS + team_index();
    if (row >= p.batch * p.queries)
        return;
    const int64 n = row / p.queries, i = row % p.queries, output = element(p.output, n, 0, i);
    const TotalRow in(p, n, i);
    if (!p.normalise) {
        visit_row(p, p.dropout, n, i, [&](int64 e, bool kept) { store_feature(p.output, output, e, in.at(e, kept)); });
        return;
    }
    const RowNorm norm = normalise_row(p.features, p.epsilon, [&](auto take) {
        visit_row(p, p.dropout, n, i, [&](int64 e, bool kept) { take(in.at(e, kept)); });
    });
    const Real *scale = (const Real *)p.scale, *bias = (const Real *)p.bias;
    const int64 total = p.total.data ? element(p.total, n, 0, i) : 0;
    visit_row(p, p.dropout, n, i, [&](int64 e, bool kept) {
        const Real x = in.at(e, kept), normed = norm(x) * (scale ? scale[e] : (Real)1);
        if (p.total.data)
            store_feature(p.total, total, e, x);
        store_feature(p.output, output, e, bias ? normed + bias[e] : normed);
    });
}

// From the gradient in `output` to those of the total, in `residual`, and of x; sums for those of scale and bias.
KERNEL(THREADS) residual_norm_backward(const __grid_constant__ NormParams p)
{
    constexpr int ROWS = 4; // whose shares are added in registers before they go to the sums
    const int64 rows = p.batch * p.queries, block = (int64)blockIdx.x * TEAMS + team_index();
    const int64 start = block * p.row_block, stop = min(rows, start + p.row_block);
    const Real *scale = (const Real *)p.scale;
    Real *of_scale = (Real *)p.partials + block * 2 * p.features, *of_bias = of_scale + p.features;
    for (int64 row = start; row < stop; row += ROWS) {
        RowNorm norms[ROWS];
        RowSlope slopes[ROWS];
        int64 total[ROWS] = {}, output[ROWS] = {};
        const auto total_at = [&](int r, int64 e) {
            return to_real(((const Stored *)p.total.data)[total[r] + e * p.total.column]);
        };
        const auto g_at = [&](int r, int64 e) {
            return to_real(((const Stored *)p.output.data)[output[r] + e * p.output.column]);
        };
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            // A row too many is the last one again: its sums are made, for the team meets in them, and never used.
            const int64 own = min(row + r, stop - 1), n = own / p.queries, i = own % p.queries;
            total[r] = element(p.total, n, 0, i);
            output[r] = element(p.output, n, 0, i);
            norms[r] = normalise_row(p.features, p.epsilon, [&](auto take) {
                visit_row(p, false, n, i, [&](int64 e, bool) { take(total_at(r, e)); });
            });
            slopes[r] = normalise_row_gradient(p.features, norms[r].factor, [&](auto take) {
                visit_row(p, false, n, i, [&](int64 e, bool) {
                    take(norms[r](total_at(r, e)), g_at(r, e) * (scale ? scale[e] : (Real)1));
                });
            });
        }
        visit_row(p, false, 0, 0, [&](int64 e, bool) {
            Real scale_sum = 0, bias_sum = 0;
#pragma unroll
            for (int r = 0; r < ROWS; r++)
                if (row + r < stop) {
                    const Real g = g_at(r, e);
                    scale_sum += g * norms[r](total_at(r, e));
                    bias_sum += g;
                }
            of_scale[e] = row == start ? scale_sum : of_scale[e] + scale_sum;
            of_bias[e] = row == start ? bias_sum : of_bias[e] + bias_sum;
        });
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            if (row + r >= stop)
                break;
            const int64 n = (row + r) / p.queries, i = (row + r) % p.queries;
            const int64 of_total = element(p.residual, n, 0, i), of_x = p.x.data ? element(p.x, n, 0, i) : 0;
            visit_row(p, p.x.data && p.dropout, n, i, [&](int64 e, bool kept) {
                const Real g = slopes[r](norms[r](total_at(r, e)), g_at(r, e) * (scale ? scale[e] : (Real)1));
                store_feature(p.residual, of_total, e, g);
                if (p.x.data)
                    store_feature(p.x, of_x, e, !p.dropout ? g : kept ? g * (Real)p.keep_scale : 0);
            });
        }
    }
}

// grad_scale and grad_bias: the sums of all blocks of rows, every warp's share in order, then the warps' in order.
KERNEL(THREADS) residual_norm_sums(const __grid_constant__ NormParams p)
{
    Real *parts = (Real *)shared_memory(); // [THREADS]
    const int64 width = 2 * p.features, column = (int64)blockIdx.x * 32 + lane_index();
    const int64 blocks = (p.batch * p.queries + p.row_block - 1) / p.row_block;
    Real sum = 0;
    if (column < width)
        for (int64 block = warp_index(); block < blocks; block += THREADS / 32)
            sum += ((const Real *)p.partials)[block * width + column];
    parts[threadIdx.x] = sum;
    __syncthreads();
    if (warp_index() || column >= width)
        return;
    for (int warp = 1; warp < THREADS / 32; warp++)
        sum += parts[32 * warp + lane_index()];
    if (column < p.features)
        ((Real *)p.grad_scale)[column] = sum;
    else
        ((Real *)p.grad_bias)[column - p.features] = sum;
}
