// Device code of blame_reduce; see bias_act.cuh for what it may use.
#pragma once
#include "cuda/bias_act.cuh"
#include "torchbp/blame_reduce.h"

namespace torchbp {

template <class T>
struct BlameArguments {
  const T *activation, *error;
  acc_t<T>*contribution, *sums;  // [samples, units]; [row blocks, stat_count, units]
  Strides as, ds;
  int64_t samples, positions, units, block_rows;
};

// The sum of one value per column lane, for each row lane; valid in column lane 0.
template <class A>
__device__ A sum_over_x(A value) {
  __shared__ A cells[lanes_y][lanes_x];
  cells[threadIdx.y][threadIdx.x] = value;
  __syncthreads();
  for (int half = lanes_x / 2; half > 0; half /= 2) {
    if (int(threadIdx.x) < half)
      cells[threadIdx.y][threadIdx.x] += cells[threadIdx.y][threadIdx.x + half];
    __syncthreads();
  }
  const A sum = cells[threadIdx.y][0];
  __syncthreads();
  return sum;
}

template <class T>
struct StatSums {
  using A = acc_t<T>;
  A value[stat_count] = {};

  template <bool gradient>
  __device__ A add(const BlameArguments<T>& q, int64_t n, int64_t p, int64_t u) {
    const Terms<A> t = terms<gradient>(up(q.activation[n * q.as.n + p * q.as.p + u * q.as.u]),
                                       up(q.error[n * q.ds.n + p * q.ds.p + u * q.ds.u]));
    value[0] += t.zeros;
    value[1] += t.activation_square;
    value[2] += t.error_square;
    return t.contribution;
  }
};

// Units in the column lanes. Without positions the row lanes take a sample each; otherwise they
// share the positions of one sample.
template <bool gradient, class T>
__global__ void units_inner_kernel(BlameArguments<T> q) {
  using A = acc_t<T>;
  const int64_t u = blockIdx.x * int64_t(lanes_x) + threadIdx.x;
  const int64_t begin = blockIdx.y * q.block_rows, limit = begin + q.block_rows;
  const int64_t end = limit < q.samples ? limit : q.samples;
  StatSums<T> stats;
  if (q.positions == 1) {
    for (int64_t n = begin + threadIdx.y; u < q.units && n < end; n += lanes_y)
      q.contribution[n * q.units + u] = stats.template add<gradient>(q, n, 0, u);
  } else {
    for (int64_t n = begin; n < end; ++n) {
      A sum = 0;
      for (int64_t p = threadIdx.y; u < q.units && p < q.positions; p += lanes_y)
        sum += stats.template add<gradient>(q, n, p, u);
      sum = sum_over_y(sum);
      if (threadIdx.y == 0 && u < q.units) q.contribution[n * q.units + u] = sum;
    }
  }
  for (int s = 0; s < stat_count; ++s) {
    const A sum = sum_over_y(stats.value[s]);
    if (threadIdx.y == 0 && u < q.units) q.sums[(blockIdx.y * stat_count + s) * q.units + u] = sum;
  }
}

// One unit per block: positions in the column lanes, a sample in each row lane.
template <bool gradient, class T>
__global__ void positions_inner_kernel(BlameArguments<T> q) {
  using A = acc_t<T>;
  const int64_t u = blockIdx.x, begin = blockIdx.y * q.block_rows, limit = begin + q.block_rows;
  const int64_t end = limit < q.samples ? limit : q.samples;
  StatSums<T> stats;
  for (int64_t first = begin; first < end; first += lanes_y) {  // all lanes: they meet in the sum
    const int64_t n = first + threadIdx.y;
    A sum = 0;
    for (int64_t p = threadIdx.x; n < end && p < q.positions; p += lanes_x)
      sum += stats.template add<gradient>(q, n, p, u);
    sum = sum_over_x(sum);
    if (threadIdx.x == 0 && n < end) q.contribution[n * q.units + u] = sum;
  }
  for (int s = 0; s < stat_count; ++s) {
    const A sum = sum_over_y(sum_over_x(stats.value[s]));
    if (threadIdx.x == 0 && threadIdx.y == 0)
      q.sums[(blockIdx.y * stat_count + s) * q.units + u] = sum;
  }
}

}  // namespace torchbp
