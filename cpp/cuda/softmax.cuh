// Device code of softmax_backward; cpp/tests runs it on a CPU.
#pragma once
#include "torchbp/elementary.h"

namespace torchbp {

inline constexpr int softmax_lanes = 128;  // the block

// The sum of one value per thread, for every thread. The order is fixed.
template <class A>
__device__ A sum_over_block(A value) {
  __shared__ A cells[softmax_lanes];
  cells[threadIdx.x] = value;
  __syncthreads();
  for (int half = softmax_lanes / 2; half > 0; half /= 2) {
    if (int(threadIdx.x) < half) cells[threadIdx.x] += cells[threadIdx.x + half];
    __syncthreads();
  }
  const A sum = cells[0];
  __syncthreads();
  return sum;
}

// A block takes one row after the other.
template <bool logarithm, class T>
__global__ void softmax_kernel(const T* g, const T* y, T* grad, int64_t rows, int64_t width) {
  using A = acc_t<T>;
  for (int64_t r = blockIdx.x; r < rows; r += gridDim.x) {
    const int64_t first = r * width;
    A sum = 0;
    for (int64_t j = first + threadIdx.x; j < first + width; j += softmax_lanes)
      sum += logarithm ? up(g[j]) : up(g[j]) * up(y[j]);
    sum = sum_over_block(sum);
    for (int64_t j = first + threadIdx.x; j < first + width; j += softmax_lanes)
      grad[j] =
          down<T>(logarithm ? up(g[j]) - exponential(up(y[j])) * sum : up(y[j]) * (up(g[j]) - sum));
  }
}

}  // namespace torchbp
