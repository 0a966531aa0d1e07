// Device code of bias_act. It uses no more of CUDA than block and thread indices, shared memory and
// __syncthreads, so that cpp/tests can run it on a CPU.
#pragma once
#include "torchbp/bias_act.h"

namespace torchbp {

inline constexpr int lanes_x = 32, lanes_y = 8;  // the block of every reducing kernel

// The sum of one value per row lane, for each column lane; valid in row lane 0. The order is fixed.
template <class A>
__device__ A sum_over_y(A value) {
  __shared__ A cells[lanes_y][lanes_x + 1];
  cells[threadIdx.y][threadIdx.x] = value;
  __syncthreads();
  A sum = 0;
  if (threadIdx.y == 0)
    for (int i = 0; i < lanes_y; ++i) sum += cells[i][threadIdx.x];
  __syncthreads();
  return sum;
}

// bias may be null; otherwise its `channels` values repeat along the elements.
template <Act act, class T>
__global__ void forward_kernel(const T* x, const T* bias, T* y, int64_t count, int64_t channels,
                               acc_t<T> alpha) {
  const int64_t step = int64_t(gridDim.x) * blockDim.x, first = blockIdx.x * int64_t(blockDim.x);
  for (int64_t i = first + threadIdx.x; i < count; i += step) {
    acc_t<T> z = up(x[i]);
    if (bias != nullptr) z += up(bias[i % channels]);
    y[i] = down<T>(forward<act>(z, alpha));
  }
}

template <Act act, class T>
__global__ void backward_kernel(const T* g, const T* x, T* grad, int64_t count, acc_t<T> alpha) {
  const int64_t step = int64_t(gridDim.x) * blockDim.x, first = blockIdx.x * int64_t(blockDim.x);
  for (int64_t i = first + threadIdx.x; i < count; i += step)
    grad[i] = down<T>(backward<act>(up(g[i]), up(x[i]), alpha));
}

// Block (column tile, row block). The columns' sums over the row block go to sums[row block].
template <Act act, class T>
__global__ void backward_bias_kernel(const T* g, const T* x, const T* bias, T* grad, int64_t rows,
                                     int64_t channels, int64_t block_rows, acc_t<T> alpha,
                                     acc_t<T>* sums) {
  using A = acc_t<T>;
  const int64_t j = blockIdx.x * int64_t(lanes_x) + threadIdx.x;
  const int64_t begin = blockIdx.y * block_rows, limit = begin + block_rows;
  const int64_t end = limit < rows ? limit : rows;
  A sum = 0;
  if (j < channels) {
    const A b = up(bias[j]);
    for (int64_t r = begin + threadIdx.y; r < end; r += lanes_y) {
      const int64_t i = r * channels + j;
      const A d = backward<act>(up(g[i]), up(x[i]) + b, alpha);
      grad[i] = down<T>(d);
      sum += d;
    }
  }
  sum = sum_over_y(sum);
  if (threadIdx.y == 0 && j < channels) sums[blockIdx.y * channels + j] = sum;
}

// out[j] = the sum of `blocks` partial sums, in order.
template <class T>
__global__ void join_kernel(const acc_t<T>* sums, T* out, int64_t blocks, int64_t count) {
  const int64_t step = int64_t(gridDim.x) * blockDim.x, first = blockIdx.x * int64_t(blockDim.x);
  for (int64_t j = first + threadIdx.x; j < count; j += step) {
    acc_t<T> sum = 0;
    for (int64_t b = 0; b < blocks; ++b) sum += sums[b * count + j];
    out[j] = down<T>(sum);
  }
}

}  // namespace torchbp
