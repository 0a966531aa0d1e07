// Device code of the cross-entropy kernels; cpp/tests runs it on a CPU.
#pragma once
#include "torchbp/cross_entropy.h"

namespace torchbp {

inline constexpr int loss_threads = 256;  // the block; it takes one row after the other

// A maximum, the sum of exponentials relative to it, and the sum of label smoothing.
template <class A>
struct PartSums {
  A most;
  double rest, shifted;
};
template <class A>
__device__ PartSums<A> joined(const PartSums<A>& a, const PartSums<A>& b) {
  const A most = a.most < b.most ? b.most : a.most, from = origin(most);
  return {most,
          a.rest * double(exp_below_zero(a.most - from)) +
              b.rest * double(exp_below_zero(b.most - from)),
          a.shifted + b.shifted};
}

// The sums of the block's threads, for every thread. The order is fixed.
template <class A>
__device__ PartSums<A> join_over_block(const PartSums<A>& mine) {
  __shared__ A most[loss_threads];
  __shared__ double rest[loss_threads], shifted[loss_threads];
  const int t = int(threadIdx.x);
  most[t] = mine.most;
  rest[t] = mine.rest;
  shifted[t] = mine.shifted;
  __syncthreads();
  for (int half = loss_threads / 2; half > 0; half /= 2) {
    if (t < half) {
      const PartSums<A> both = joined<A>({most[t], rest[t], shifted[t]},
                                         {most[t + half], rest[t + half], shifted[t + half]});
      most[t] = both.most;
      rest[t] = both.rest;
      shifted[t] = both.shifted;
    }
    __syncthreads();
  }
  const PartSums<A> all{most[0], rest[0], shifted[0]};
  __syncthreads();
  return all;
}

template <class T>
struct LossArguments {
  using A = acc_t<T>;
  const T *logits, *weight;
  const int64_t* target;
  const A* grad;     // of the loss, or null
  const double* by;  // the sum of all class weights, then what a mean divides by
  T* to;             // the gradient of the logits, or null; may be the logits
  A* both;           // losses and log-odds, [2, rows], or null
  int64_t rows;
  LossSettings<A> settings;
  bool grad_by_row, mean;
};

// A thread's share of the sums of a row. The running sum is short: its block is long.
template <class T>
__device__ PartSums<acc_t<T>> scan_share(const T* z, const T* weight, int64_t y, acc_t<T> shift,
                                         const LossSettings<acc_t<T>>& q) {
  using A = acc_t<T>;
  PartSums<A> sums{RowSums<A>::lowest, 0, 0};
  A run = 0;
  for (int64_t k = threadIdx.x; k < q.classes; k += loss_threads) {
    if (k == y) continue;
    const A v = up(z[k]);
    if (sums.most < v) {
      run *= exp_below_zero(sums.most - v);
      sums.most = v;
    }
    run += exp_below_zero(v - origin(sums.most));
    if (q.smoothing != 0)
      sums.shifted += (weight == nullptr ? 1. : double(up(weight[k]))) * double(v - shift);
  }
  sums.rest = double(run);
  return sums;
}

template <class T>
__device__ void loss_row(const LossArguments<T>& p, LossSettings<acc_t<T>> q, int64_t i) {
  using A = acc_t<T>;
  const int64_t y = p.target[i];
  const T* z = p.logits + i * q.classes;
  T* to = p.to == nullptr ? nullptr : p.to + i * q.classes;
  const bool ignored = y == q.ignore_index, there = 0 <= y && y < q.classes;
  if (ignored || !there) {  // a class out of range makes NaN: a kernel cannot raise an error
    const A value = ignored ? A(0) : std::numeric_limits<A>::quiet_NaN();
    for (int64_t k = threadIdx.x; to != nullptr && k < q.classes; k += loss_threads)
      to[k] = down<T>(value);
    if (threadIdx.x == 0 && p.both != nullptr) {
      p.both[i] = value;
      p.both[p.rows + i] = ignored ? -RowSums<A>::lowest : value;
    }
    return;
  }
  RowSums<A> row(up(z[y]));
  const PartSums<A> sums = join_over_block(scan_share(z, p.weight, y, row.shift, q));
  row.most = sums.most;
  row.rest = sums.rest;
  row.shifted = sums.shifted;
  const double own_weight = p.weight == nullptr ? 1. : double(up(p.weight[y]));
  if (threadIdx.x == 0 && p.both != nullptr) {
    const RowLoss<A> one = row_loss(row, own_weight, q);
    p.both[i] = one.loss;
    p.both[p.rows + i] = one.log_odds;
  }
  if (to == nullptr) return;
  const double g = double(p.grad[p.grad_by_row ? i : 0]) / (p.mean ? p.by[1] : 1.);
  const RowGradient<A> d = row_gradient(row, g, own_weight, q);
  const A from = origin(row.most);
  for (int64_t k = threadIdx.x; k < q.classes; k += loss_threads) {
    const A share = p.weight == nullptr || d.share == A(0) ? d.share : d.share * up(p.weight[k]);
    to[k] = down<T>(k == y ? d.own : d.slope * exp_below_zero(up(z[k]) - from) - share);
  }
}

template <class T>
__global__ void loss_kernel(LossArguments<T> p) {
  LossSettings<acc_t<T>> q = p.settings;
  q.weight_sum = p.by[0];
  for (int64_t i = blockIdx.x; i < p.rows; i += gridDim.x) loss_row(p, q, i);
}

// One block: sums[0] over all classes, sums[1] over the rows that count.
template <class T>
__global__ void loss_weights_kernel(const T* weight, const int64_t* target, int64_t rows,
                                    int64_t classes, int64_t ignore_index, double* sums) {
  using A = acc_t<T>;
  double of_classes = 0, of_rows = 0;
  if (weight != nullptr)
    for (int64_t k = threadIdx.x; k < classes; k += loss_threads)
      of_classes += double(up(weight[k]));
  for (int64_t i = threadIdx.x; i < rows; i += loss_threads) {
    const int64_t y = target[i];
    if (y == ignore_index || y < 0 || y >= classes) continue;
    of_rows += weight == nullptr ? 1. : double(up(weight[y]));
  }
  const PartSums<A> all = join_over_block<A>({A(0), of_classes, of_rows});
  if (threadIdx.x != 0) return;
  sums[0] = weight == nullptr ? double(classes) : all.rest;
  sums[1] = all.shifted;
}

// One block: the losses of the rows into one number.
template <class T>
__global__ void loss_sum_kernel(const acc_t<T>* losses, int64_t rows, const double* by, bool mean,
                                T* loss) {
  using A = acc_t<T>;
  double sum = 0;
  for (int64_t i = threadIdx.x; i < rows; i += loss_threads) sum += double(losses[i]);
  const PartSums<A> all = join_over_block<A>({A(0), sum, 0});
  if (threadIdx.x == 0) *loss = down<T>(A(all.rest / (mean ? by[1] : 1.)));
}

template <class T>
__global__ void loss_cast_kernel(const acc_t<T>* losses, int64_t rows, T* loss) {
  const int64_t i = int64_t(blockIdx.x) * loss_threads + threadIdx.x;
  if (i < rows) loss[i] = down<T>(losses[i]);
}

}  // namespace torchbp
