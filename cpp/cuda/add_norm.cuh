// Device code of add_norm and of the backward pass of every norm of rows; cpp/tests runs it on a
// CPU. A block takes one row after the other.
#pragma once
#include "cuda/softmax.cuh"
#include "torchbp/bits.h"
#include "torchbp/norm.h"

namespace torchbp {

template <class T>
struct AddNormArguments {
  using A = acc_t<T>;
  const T *x, *residual;
  const uint8_t* mask;               // none: null
  const T *weight, *bias;            // none: null; in the dtype of x
  const A *wide_weight, *wide_bias;  // or in that of sums
  T *y, *sum;                        // without a residual x is normalised, and sum is null
  A *mean, *rstd, noise;             // mean is null for RMS norm
  double eps;
  int64_t rows, columns;
};

// A parameter, in whichever of the two dtypes it came.
template <class T>
__device__ acc_t<T> parameter(const T* narrow, const acc_t<T>* wide, int64_t j, acc_t<T> none) {
  return narrow != nullptr ? up(narrow[j]) : wide != nullptr ? wide[j] : none;
}

template <class T>
__global__ void add_norm_kernel(AddNormArguments<T> q) {
  using A = acc_t<T>;
  for (int64_t row = blockIdx.x; row < q.rows; row += gridDim.x) {
    const int64_t first = row * q.columns, last = first + q.columns;
    const T* s = q.residual == nullptr ? q.x : q.sum;
    A sum = 0;
    for (int64_t i = first + threadIdx.x; i < last; i += softmax_lanes) {
      if (q.residual != nullptr) {
        T x = q.x[i];
        if (q.mask != nullptr) x = down<T>(up(x) * (bit_at(q.mask, i) ? q.noise : A(0)));
        q.sum[i] = down<T>(up(x) + up(q.residual[i]));
      }
      sum += up(s[i]);
    }
    const A mean = q.mean == nullptr ? A(0) : sum_over_block(sum) / A(q.columns);
    A square = 0;
    // Every thread reads again what it wrote itself.
    for (int64_t i = first + threadIdx.x; i < last; i += softmax_lanes) {
      const A c = up(s[i]) - mean;
      square += c * c;
    }
    square = sum_over_block(square);
    const A rstd = A(1 / sqrt(double(square) / double(q.columns) + q.eps));
    if (threadIdx.x == 0) {
      q.rstd[row] = rstd;
      if (q.mean != nullptr) q.mean[row] = mean;
    }
    for (int64_t i = first + threadIdx.x; i < last; i += softmax_lanes) {
      const int64_t j = i - first;
      const A w = parameter(q.weight, q.wide_weight, j, A(1));
      q.y[i] = down<T>((up(s[i]) - mean) * rstd * w + parameter(q.bias, q.wide_bias, j, A(0)));
    }
  }
}

template <class T>
struct NormBackwardArguments {
  using A = acc_t<T>;
  const T *grad_output, *grad_sum, *x;  // grad_sum and mask may be null
  const uint8_t* mask;
  const A *mean, *rstd;  // mean is null for RMS norm
  const T* weight;       // as in AddNormArguments
  const A* wide_weight;
  T *grad_input, *grad_branch;
  A* sums;  // [blocks, 2, columns]
  A noise;
  int64_t rows, columns, block_rows;
};

// A block's sums over its rows lie in global memory, a cell for one thread: the cache keeps them.
template <class T>
__global__ void norm_backward_kernel(NormBackwardArguments<T> q) {
  using A = acc_t<T>;
  const int64_t begin = blockIdx.x * q.block_rows, limit = begin + q.block_rows;
  const int64_t end = limit < q.rows ? limit : q.rows;
  A* of_weight = q.sums + blockIdx.x * 2 * q.columns;
  A* of_bias = of_weight + q.columns;
  // The last blocks may have no rows at all.
  for (int64_t j = threadIdx.x; j < q.columns; j += softmax_lanes) of_weight[j] = of_bias[j] = 0;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t first = row * q.columns;
    const A mean = q.mean == nullptr ? A(0) : q.mean[row], rstd = q.rstd[row];
    A sum = 0, product = 0;
    for (int64_t j = threadIdx.x; j < q.columns; j += softmax_lanes) {
      const A g = up(q.grad_output[first + j]), c = up(q.x[first + j]) - mean;
      const A v = g * parameter(q.weight, q.wide_weight, j, A(1));
      sum += v;
      product += v * c;
      of_weight[j] += g * (c * rstd);
      of_bias[j] += g;
    }
    product = sum_over_block(product);
    sum = q.mean == nullptr ? A(0) : sum_over_block(sum);
    const auto gradient =
        norm_gradient<A>(double(rstd), double(sum), double(product), double(q.columns));
    for (int64_t j = threadIdx.x; j < q.columns; j += softmax_lanes) {
      const int64_t i = first + j;
      const A w = parameter(q.weight, q.wide_weight, j, A(1));
      A grad = apply(gradient, up(q.grad_output[i]) * w, up(q.x[i]) - mean);
      if (q.grad_sum != nullptr) grad += up(q.grad_sum[i]);
      const T rounded = down<T>(grad);
      q.grad_input[i] = rounded;
      if (q.mask != nullptr)
        q.grad_branch[i] = down<T>(up(rounded) * (bit_at(q.mask, i) ? q.noise : A(0)));
    }
  }
}

}  // namespace torchbp
