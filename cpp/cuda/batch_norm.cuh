// Device code of batch_norm_backward; cpp/tests runs it on a CPU.
#pragma once
#include "cuda/blame_reduce.cuh"
#include "torchbp/norm.h"

namespace torchbp {

// Samples x channels x positions; see cpu/batch_norm.cpp. Positions are cut into blocks.
template <class T>
struct BatchNormArguments {
  using A = acc_t<T>;
  const T *grad_output, *x;
  const A *mean, *rstd;
  const T* weight;       // none: null; in the dtype of x
  const A* wide_weight;  // or in that of sums
  T* grad_input;
  A *sums, *slope, *shift;  // [samples, blocks, 2, channels]; one value for each statistic
  A *grad_weight, *grad_bias;
  int64_t samples, channels, positions, groups, blocks, block_rows;
  bool channels_inner, training;

  __device__ int64_t at(int64_t n, int64_t c, int64_t p) const {
    return n * channels * positions + (channels_inner ? p * channels + c : c * positions + p);
  }
  __device__ int64_t statistic(int64_t n, int64_t c) const {
    return groups == 0 ? c : n * groups + c / (channels / groups);
  }
  __device__ A weight_of(int64_t c) const {
    return weight != nullptr ? up(weight[c]) : wide_weight != nullptr ? wide_weight[c] : A(1);
  }
  // The sum of g, or of g (x - mean), over the positions of one channel of one sample.
  __device__ double plane(int64_t n, int64_t c, int which) const {
    double sum = 0;
    for (int64_t b = 0; b < blocks; ++b)
      sum += double(sums[((n * blocks + b) * 2 + which) * channels + c]);
    return sum;
  }
};

// Block (channels, blocks of positions of a sample, one after the other). Channels innermost: a
// channel in each column lane; else one channel for the whole block.
template <class T>
__global__ void plane_sums_kernel(BatchNormArguments<T> q) {
  using A = acc_t<T>;
  const bool inner = q.channels_inner;
  const int64_t c = inner ? blockIdx.x * int64_t(lanes_x) + threadIdx.x : blockIdx.x;
  const int64_t first = inner ? threadIdx.y : threadIdx.y * lanes_x + threadIdx.x;
  const int64_t step = inner ? lanes_y : lanes_x * lanes_y;
  for (int64_t i = blockIdx.y; i < q.samples * q.blocks; i += gridDim.y) {
    const int64_t n = i / q.blocks, begin = i % q.blocks * q.block_rows;
    const int64_t limit = begin + q.block_rows, end = limit < q.positions ? limit : q.positions;
    A sum = 0, product = 0;
    if (c < q.channels) {
      const A mean = q.mean[q.statistic(n, c)];
      for (int64_t p = begin + first; p < end; p += step) {
        const int64_t at = q.at(n, c, p);
        const A g = up(q.grad_output[at]);
        sum += g;
        product += g * (up(q.x[at]) - mean);
      }
    }
    sum = sum_over_y(inner ? sum : sum_over_x(sum));
    product = sum_over_y(inner ? product : sum_over_x(product));
    if (threadIdx.y != 0 || c >= q.channels || (!inner && threadIdx.x != 0)) continue;
    A* out = q.sums + i * 2 * q.channels + c;
    out[0] = sum;
    out[q.channels] = product;
  }
}

// A thread takes a statistic: its part of the gradient.
template <class T>
__global__ void statistic_kernel(BatchNormArguments<T> q) {
  using A = acc_t<T>;
  const bool batch = q.groups == 0;
  const int64_t count = batch ? q.samples : q.channels / q.groups;
  const int64_t statistics = batch ? q.channels : q.samples * q.groups;
  const int64_t step = int64_t(gridDim.x) * blockDim.x, first = blockIdx.x * int64_t(blockDim.x);
  for (int64_t s = first + threadIdx.x; s < statistics; s += step) {
    double sum = 0, product = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t n = batch ? i : s / q.groups, c = batch ? s : s % q.groups * count + i;
      const double w = double(q.weight_of(c));
      sum += w * q.plane(n, c, 0);
      product += w * q.plane(n, c, 1);
    }
    const auto gradient =
        norm_gradient<A>(double(q.rstd[s]), sum, product, double(count * q.positions));
    q.slope[s] = gradient.slope;
    q.shift[s] = gradient.shift;
  }
}

// A thread takes a channel: the gradients of its weight and bias.
template <class T>
__global__ void parameter_kernel(BatchNormArguments<T> q) {
  using A = acc_t<T>;
  const int64_t step = int64_t(gridDim.x) * blockDim.x, first = blockIdx.x * int64_t(blockDim.x);
  for (int64_t c = first + threadIdx.x; c < q.channels; c += step) {
    double of_weight = 0, of_bias = 0;
    for (int64_t n = 0; n < q.samples; ++n) {
      of_weight += double(q.rstd[q.statistic(n, c)]) * q.plane(n, c, 1);
      of_bias += q.plane(n, c, 0);
    }
    q.grad_weight[c] = A(of_weight);
    q.grad_bias[c] = A(of_bias);
  }
}

template <class T>
__global__ void channel_gradient_kernel(BatchNormArguments<T> q) {
  using A = acc_t<T>;
  const int64_t count = q.samples * q.channels * q.positions;
  const int64_t step = int64_t(gridDim.x) * blockDim.x, first = blockIdx.x * int64_t(blockDim.x);
  for (int64_t i = first + threadIdx.x; i < count; i += step) {
    const int64_t sample = q.channels * q.positions, n = i / sample, k = i % sample;
    const int64_t c = q.channels_inner ? k % q.channels : k / q.positions;
    const int64_t s = q.statistic(n, c);
    const A scale = q.rstd[s] * q.weight_of(c), g = up(q.grad_output[i]);
    // With constant statistics the map is linear: x plays no part in the gradient.
    const NormGradient<A> gradient{scale, q.slope[s], q.shift[s]};
    q.grad_input[i] = down<T>(q.training ? apply(gradient, g, up(q.x[i]) - q.mean[s]) : scale * g);
  }
}

}  // namespace torchbp
