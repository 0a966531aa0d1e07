// Device code of max_pool: a thread for every window, and for every element of the input. Nothing
// is scattered, so that sums have one order.
#pragma once
#include "torchbp/max_pool.h"

namespace torchbp {

// Where the elements of a batch of planes lie; the threads run along the channels where those are
// next to each other.
struct Placement {
  int64_t sample, channel, step[3];
  bool channels_inner;
};

struct Place {
  int64_t n, c, at[3];
};
__device__ inline Place place_of(int64_t i, const int64_t* size, int64_t channels,
                                 bool channels_inner) {
  Place p{};
  if (channels_inner) {
    p.c = i % channels;
    i /= channels;
  }
  for (int d = 2; d >= 0; --d) {
    p.at[d] = i % size[d];
    i /= size[d];
  }
  if (channels_inner) {
    p.n = i;
  } else {
    p.c = i % channels;
    p.n = i / channels;
  }
  return p;
}
__device__ inline int64_t plane_of(const Placement& t, const Place& p) {
  return p.n * t.sample + p.c * t.channel;
}
__device__ inline int64_t within_plane(const Placement& t, int64_t d, int64_t h, int64_t w) {
  return d * t.step[0] + h * t.step[1] + w * t.step[2];
}

// y and offsets lie alike.
template <class T, class O>
__global__ void max_pool_kernel(Pool q, const T* x, Placement of_x, T* y, O* offsets,
                                Placement of_y, int64_t count) {
  using A = acc_t<T>;
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < count; i += stride) {
    const Place p = place_of(i, q.out, q.channels, of_y.channels_inner);
    const T* plane = x + plane_of(of_x, p);
    A best = -A(INFINITY);
    int64_t which = q.first_tap(p.at[0], p.at[1], p.at[2]);
    for (int64_t a = 0, tap = 0; a < q.kernel[0]; ++a)
      for (int64_t b = 0; b < q.kernel[1]; ++b)
        for (int64_t c = 0; c < q.kernel[2]; ++c, ++tap) {
          const int64_t d = q.begin(0, p.at[0]) + a * q.dilation[0];
          const int64_t h = q.begin(1, p.at[1]) + b * q.dilation[1];
          const int64_t w = q.begin(2, p.at[2]) + c * q.dilation[2];
          if (d < 0 || d >= q.in[0] || h < 0 || h >= q.in[1] || w < 0 || w >= q.in[2]) continue;
          const A value = up(plane[within_plane(of_x, d, h, w)]);
          if (!beats(value, best)) continue;
          best = value;
          which = tap;
        }
    const int64_t to = plane_of(of_y, p) + within_plane(of_y, p.at[0], p.at[1], p.at[2]);
    y[to] = down<T>(best);
    offsets[to] = O(which);
  }
}

// The window of which element i is tap `t`, along one dimension; -1 if there is none.
__device__ inline int64_t window_of(const Pool& q, int d, int64_t i, int64_t t) {
  const int64_t at = i + q.padding[d] - t * q.dilation[d];
  if (at < 0 || at % q.stride[d] != 0 || at / q.stride[d] >= q.out[d]) return -1;
  return at / q.stride[d];
}

template <class T, class O>
__global__ void max_pool_backward_kernel(Pool q, const T* g, Placement of_g, const O* offsets,
                                         Placement of_offsets, T* grad, Placement of_grad,
                                         int64_t count) {
  using A = acc_t<T>;
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < count; i += stride) {
    const Place p = place_of(i, q.in, q.channels, of_grad.channels_inner);
    const T* plane = g + plane_of(of_g, p);
    const O* which = offsets + plane_of(of_offsets, p);
    A sum = 0;
    // The last tap first: in the order of the windows.
    for (int64_t a = q.kernel[0] - 1; a >= 0; --a) {
      const int64_t d = window_of(q, 0, p.at[0], a);
      for (int64_t b = q.kernel[1] - 1; d >= 0 && b >= 0; --b) {
        const int64_t h = window_of(q, 1, p.at[1], b);
        for (int64_t c = q.kernel[2] - 1; h >= 0 && c >= 0; --c) {
          const int64_t w = window_of(q, 2, p.at[2], c);
          if (w < 0) continue;
          const O tap = O((a * q.kernel[1] + b) * q.kernel[2] + c);
          if (which[within_plane(of_offsets, d, h, w)] == tap)
            sum += up(plane[within_plane(of_g, d, h, w)]);
        }
      }
    }
    grad[plane_of(of_grad, p) + within_plane(of_grad, p.at[0], p.at[1], p.at[2])] = down<T>(sum);
  }
}

}  // namespace torchbp
