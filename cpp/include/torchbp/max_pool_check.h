// Arguments of max_pool and max_pool_backward, checked the same way on every device.
#pragma once
#include <limits>
#include <tuple>
#include <vector>

#include "torchbp/max_pool.h"
#include "torchbp/tensor.h"

namespace torchbp {

using Sizes = std::vector<int64_t>;

inline void check_setting(const char* name, const Sizes& values, int64_t dims, int64_t least) {
  bool right = int64_t(values.size()) == dims;
  for (const int64_t value : values) right &= value >= least;
  STD_TORCH_CHECK(right, name, ": expected ", dims, " numbers from ", least, " on");
}

inline int64_t windows(int64_t in, int64_t kernel, int64_t stride, int64_t padding,
                       int64_t dilation, bool ceil_mode) {
  const int64_t room = in + 2 * padding - dilation * (kernel - 1) - 1;
  if (room < 0) return 0;
  const int64_t count = (room + (ceil_mode ? stride - 1 : 0)) / stride + 1;
  return ceil_mode && (count - 1) * stride >= in + padding ? count - 1 : count;  // none in padding
}

// Of an input of that shape; `out` is left 0.
inline Pool pool_of(const Sizes& shape, const Sizes& kernel, const Sizes& stride,
                    const Sizes& padding, const Sizes& dilation) {
  const int64_t dims = int64_t(kernel.size()), rank = int64_t(shape.size());
  STD_TORCH_CHECK(dims >= 1 && dims <= 3, "kernel: expected 1 to 3 numbers, got ", dims);
  STD_TORCH_CHECK(rank == dims + 1 || rank == dims + 2, "x: expected ", dims + 1, " or ", dims + 2,
                  " dims, got ", rank);
  check_setting("kernel", kernel, dims, 1);
  check_setting("stride", stride, dims, 1);
  check_setting("padding", padding, dims, 0);
  check_setting("dilation", dilation, dims, 1);
  Pool q{rank == dims + 2 ? shape[0] : 1,
         shape[rank - dims - 1],
         {1, 1, 1},
         {1, 1, 1},
         {1, 1, 1},
         {1, 1, 1},
         {0, 0, 0},
         {1, 1, 1}};
  for (int64_t d = 0; d < dims; ++d) {
    const int64_t to = 3 - dims + d;
    STD_TORCH_CHECK(2 * padding[d] <= kernel[d], "padding: expected at most half of the kernel");
    q.in[to] = shape[rank - dims + d];
    q.kernel[to] = kernel[d];
    q.stride[to] = stride[d];
    q.padding[to] = padding[d];
    q.dilation[to] = dilation[d];
  }
  return q;
}

inline Sizes shape_of(const Tensor& t) { return Sizes(t.sizes().begin(), t.sizes().end()); }

inline Pool check_max_pool(const Tensor& x, const Sizes& kernel, const Sizes& stride,
                           const Sizes& padding, const Sizes& dilation, bool ceil_mode) {
  Pool q = pool_of(shape_of(x), kernel, stride, padding, dilation);
  for (int d = 0; d < 3; ++d) {
    q.out[d] = windows(q.in[d], q.kernel[d], q.stride[d], q.padding[d], q.dilation[d], ceil_mode);
    STD_TORCH_CHECK(q.out[d] > 0, "x: expected room for a window, got ", q.in[d], " elements");
  }
  return q;
}

// The shape of the result.
inline Sizes pooled_shape(const Tensor& x, const Pool& q, int64_t dims) {
  Sizes shape = shape_of(x);
  for (int64_t d = 0; d < dims; ++d) shape[shape.size() - dims + d] = q.out[3 - dims + d];
  return shape;
}

inline ScalarType offsets_dtype(const Pool& q) {
  return q.taps() <= most_short_taps ? ScalarType::Byte : ScalarType::Int;
}

inline Pool check_max_pool_backward(const Tensor& grad, const Tensor& offsets, const Sizes& shape,
                                    const Sizes& kernel, const Sizes& stride, const Sizes& padding,
                                    const Sizes& dilation) {
  Pool q = pool_of(shape, kernel, stride, padding, dilation);
  check_same_shape(offsets, "offsets", grad, "grad_output");
  STD_TORCH_CHECK(offsets.device() == grad.device(), "offsets: expected the device of grad_output");
  STD_TORCH_CHECK(offsets.scalar_type() == offsets_dtype(q), "offsets: expected ",
                  torch::headeronly::toString(offsets_dtype(q)), ", got ",
                  torch::headeronly::toString(offsets.scalar_type()));
  const int64_t dims = int64_t(kernel.size()), first = int64_t(shape.size()) - dims;
  bool right = grad.dim() == int64_t(shape.size());
  for (int64_t d = 0; right && d < first; ++d) right = grad.size(d) == shape[d];
  STD_TORCH_CHECK(right, "grad_output: expected the samples and channels of shape");
  for (int64_t d = 0; d < dims; ++d) {
    const int64_t to = 3 - dims + d, size = grad.size(first + d);
    const auto counted = [&](bool ceil_mode) {
      return windows(q.in[to], q.kernel[to], q.stride[to], q.padding[to], q.dilation[to],
                     ceil_mode);
    };
    STD_TORCH_CHECK(size == counted(false) || size == counted(true), "grad_output: expected ",
                    counted(false), " windows along dim ", first + d, ", got ", size);
    q.out[to] = size;
  }
  return q;
}

// Whether torch takes the tensor for channels last: the strides grow in the order of channels,
// width, height, depth, samples, and samples are not told apart by the channels' stride alone.
inline bool channels_last(const Tensor& t, int64_t dims) {
  if (t.dim() != dims + 2 || t.stride(1) == 0) return false;
  int64_t least = 0;
  const auto next = [&](int64_t size, int64_t stride) {
    if (size == 0 || stride < least) return false;
    least = size > 1 ? stride * size : stride;
    return true;
  };
  if (!next(t.size(1), t.stride(1))) return false;
  for (int64_t d = dims + 1; d >= 2; --d)
    if (!next(t.size(d), t.stride(d))) return false;
  // One dimension is pooled as two, the height being 1.
  if (dims == 1 && !next(1, t.size(2) * t.stride(2))) return false;
  return least != t.stride(1) && next(t.size(0), t.stride(0));
}

// An empty tensor of that shape; where `last`, its channels lie next to each other.
inline Tensor pooled(const Tensor& like, const Sizes& shape, ScalarType dtype, bool last) {
  if (!last) return fresh(like, shape, dtype);
  Sizes order{shape[0]};
  order.insert(order.end(), shape.begin() + 2, shape.end());
  order.push_back(shape[1]);
  Tensor t = fresh(like, order, dtype);
  for (int64_t d = int64_t(shape.size()) - 2; d >= 1; --d)
    t = torch::stable::transpose(t, d, d + 1);
  return t;
}

// `t` itself where the loops can read it: contiguous, or with channels next to each other.
inline Tensor readable(const Tensor& t, bool last) {
  if (!last) return packed(t);
  if (t.stride(1) == 1) return t;
  Tensor copy = pooled(t, shape_of(t), t.scalar_type(), last);
  torch::stable::copy_(copy, t);
  return copy;
}

inline Steps steps(const Tensor& t, int64_t dims) {
  Steps s{t.stride(0), {0, 0, 0}};
  for (int64_t d = 0; d < dims; ++d) s.step[3 - dims + d] = t.stride(2 + d);
  return s;
}

// Calls f with a value of the type of tap numbers.
template <class F>
void with_offset(const Pool& q, F&& f) {
  if (q.taps() <= most_short_taps)
    f(uint8_t{});
  else
    f(int32_t{});
}

}  // namespace torchbp
