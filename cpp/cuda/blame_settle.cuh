// Device code of blame_settle; see bias_act.cuh for what it may use.
#pragma once
#include "cuda/blame_reduce.cuh"
#include "torchbp/blame_settle.h"

namespace torchbp {

template <class T>
struct SettleArguments {
  const T* contribution;
  const Sample<T>* shared;
  const int64_t* labels;
  T *rows, *per_class, *per_sample;
  T inverse_scale;
  int64_t samples, units, n_classes, layers;
  int64_t row_units = units;  // of a row of the results, which may hold other layers too
  const T* stats = nullptr;   // [3, units], to be passed on to the last three rows
};

// Column limits of some of the layers, handed over by value.
struct LayerGroup {
  static constexpr int64_t size = 64;
  int64_t first_layer, limits[size + 1];
};

template <class T>
__global__ void sample_kernel(const T* losses, Sample<T>* shared, int64_t samples, BlameKind kind) {
  const int64_t step = int64_t(gridDim.x) * blockDim.x, first = blockIdx.x * int64_t(blockDim.x);
  for (int64_t n = first + threadIdx.x; n < samples; n += step)
    shared[n] = sample_of(kind, losses[n]);
}

template <class T>
__device__ T blame_at(const SettleArguments<T>& q, int64_t n, int64_t u) {
  const Sample<T>& s = q.shared[n];
  const T t = q.contribution[n * q.units + u] * q.inverse_scale;
  switch (s.form) {
    case Form::low_loss: return blame<Form::low_loss>(s, t);
    case Form::high_loss: return blame<Form::high_loss>(s, t);
    case Form::squared: return blame<Form::squared>(s, t);
    default: return t;
  }
}

// rows and per_class. Each row lane takes the samples of every lanes_y-th class, so that no two
// threads add to one cell, and sums keep their order.
template <class T>
__global__ void columns_kernel(SettleArguments<T> q) {
  const int64_t u = blockIdx.x * int64_t(lanes_x) + threadIdx.x;
  T sum = 0, absolute = 0, square = 0;
  for (int64_t n = 0; u < q.units && n < q.samples; ++n) {
    const int64_t label = q.labels == nullptr ? -1 : q.labels[n];
    const bool known = label >= 0 && label < q.n_classes;
    if ((known ? label : n) % lanes_y != threadIdx.y) continue;
    const T b = blame_at(q, n, u);
    sum += b;
    absolute += magnitude(b);
    square += b * b;
    if (known) q.per_class[label * q.row_units + u] += b;
  }
  sum = sum_over_y(sum);
  absolute = sum_over_y(absolute);
  square = sum_over_y(square);
  if (threadIdx.y != 0 || u >= q.units) return;
  q.rows[u] = sum;
  q.rows[q.row_units + u] = absolute;
  q.rows[2 * q.row_units + u] = square;
  if (q.stats == nullptr) return;
  for (int s = 0; s < 3; ++s) {
    const T factor = s == 2 ? q.inverse_scale * q.inverse_scale : T(1);
    q.rows[(3 + s) * q.row_units + u] = q.stats[s * q.units + u] * factor;
  }
}

// per_sample: a block takes one layer and a sample in each row lane. It reads the contributions a
// second time, by now from the cache, which is cheaper than to sum across the blocks above.
template <class T>
__global__ void layers_kernel(SettleArguments<T> q, LayerGroup group) {
  const int64_t n = blockIdx.x * int64_t(lanes_y) + threadIdx.y;
  const int64_t begin = group.limits[blockIdx.y], end = group.limits[blockIdx.y + 1];
  T sum = 0;
  for (int64_t u = begin + threadIdx.x; n < q.samples && u < end; u += lanes_x)
    sum += blame_at(q, n, u);
  sum = sum_over_x(sum);
  if (threadIdx.x == 0 && n < q.samples)
    q.per_sample[n * q.layers + group.first_layer + blockIdx.y] = sum;
}

// Calls f with groups of at most LayerGroup::size layers, and how many there are in it.
template <class F>
void each_layer_group(const int64_t* sizes, int64_t layers, const F& f) {
  int64_t limit = 0;
  for (int64_t first = 0; first < layers; first += LayerGroup::size) {
    LayerGroup group{first, {limit}};
    int64_t count = 0;
    for (; count < LayerGroup::size && first + count < layers; ++count)
      group.limits[count + 1] = limit += sizes[first + count];
    f(group, unsigned(count));
  }
}

}  // namespace torchbp
