// What every kernel needs to know of a tensor. The only header that includes torch.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>

#include "torchbp/scalar.h"

namespace torchbp {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T>
const T* input(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
T* output(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// Calls f with a value of the element type of `dtype`.
template <class F>
void with_scalar(ScalarType dtype, const char* argument, F&& f) {
  switch (dtype) {
    case ScalarType::Double: return f(double{});
    case ScalarType::Float: return f(float{});
    case ScalarType::BFloat16: return f(bf16{});
    case ScalarType::Half: return f(f16{});
    default:
      STD_TORCH_CHECK(false, argument, ": expected float32, float64, bfloat16 or float16, got ",
                      torch::headeronly::toString(dtype));
  }
}

inline void check_alike(const Tensor& t, const char* name, const Tensor& like,
                        const char* like_name) {
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), name, ": expected the dtype of ",
                  like_name, ", ", torch::headeronly::toString(like.scalar_type()), ", got ",
                  torch::headeronly::toString(t.scalar_type()));
  STD_TORCH_CHECK(t.device() == like.device(), name, ": expected the device of ", like_name);
}

inline void check_same_shape(const Tensor& t, const char* name, const Tensor& like,
                             const char* like_name) {
  STD_TORCH_CHECK(t.sizes().equals(like.sizes()), name, ": expected the shape of ", like_name);
}

// An empty tensor, on the device of `like` and of its dtype unless another one is given.
// torch::stable::new_empty and empty_like look an operator up by its name on every call, which
// takes longer than the work of a small tensor.
inline Tensor fresh(const Tensor& like, const int64_t* sizes, const int64_t* strides, int64_t dims,
                    std::optional<ScalarType> dtype = std::nullopt) {
  using torch::stable::detail::from, torch::stable::detail::to;
  int32_t type = 0, device = 0, index = 0;
  const bool known = aoti_torch_get_device_type(like.get(), &device) == 0 &&
                     aoti_torch_get_device_index(like.get(), &index) == 0 &&
                     (dtype ? (type = to<int32_t>(from(*dtype)), true)
                            : aoti_torch_get_dtype(like.get(), &type) == 0);
  STD_TORCH_CHECK(known, "cannot tell the dtype and the device of a tensor");
  AtenTensorHandle handle;
  STD_TORCH_CHECK(aoti_torch_empty_strided(dims, sizes, strides, type, device, index, &handle) == 0,
                  "cannot allocate a tensor");
  return Tensor(handle);
}
inline Tensor fresh(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                    std::optional<ScalarType> dtype = std::nullopt) {
  constexpr int64_t most = 16;
  const int64_t dims = int64_t(sizes.size());
  if (dims > most) return torch::stable::new_empty(like, sizes, dtype);
  int64_t strides[most], step = 1;
  for (int64_t d = dims - 1; d >= 0; --d) {
    strides[d] = step;
    step *= std::max<int64_t>(sizes[d], 1);
  }
  return fresh(like, sizes.data(), strides, dims, dtype);
}
// Strides as of torch.empty_like.
inline Tensor fresh_like(const Tensor& t) {
  return t.is_contiguous() ? fresh(t, t.sizes().data(), t.strides().data(), t.dim())
                           : torch::stable::empty_like(t);
}

// `t` itself where it is contiguous: asking costs less than the operator that would return it.
inline Tensor packed(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

// `t` itself where its strides are those of `like`, otherwise a copy that has them.
inline Tensor with_strides_of(const Tensor& t, const Tensor& like) {
  if (t.strides().equals(like.strides())) return t;
  Tensor copy = torch::stable::empty_like(like);
  torch::stable::copy_(copy, t);
  return copy;
}

// How a matrix is cut into tasks: by the shape alone, never by the number of threads, so that sums
// come out bitwise the same whatever the machine runs them on. Row blocks need a copy of the sums
// each and are therefore made only as far as the column tiles leave threads without work.
struct Partition {
  static constexpr int64_t tile = 512;
  int64_t rows, columns, width, tiles, blocks, block_rows, elements_per_task;

  Partition(int64_t rows_, int64_t columns_, int64_t elements, int64_t width_ = tile)
      : rows(rows_), columns(columns_), width(width_) {
    tiles = std::max<int64_t>(1, ceil_div(columns, width));
    blocks = std::clamp<int64_t>(std::min(ceil_div(64, tiles), elements >> 16), 1,
                                 std::max<int64_t>(1, rows));
    block_rows = ceil_div(rows, blocks);
    elements_per_task = std::max<int64_t>(1, elements / tasks());
  }
  int64_t tasks() const { return tiles * blocks; }
  int64_t grain() const { return ceil_div(16384, elements_per_task); }
  int64_t row_begin(int64_t block) const { return std::min(rows, block * block_rows); }
  int64_t row_end(int64_t block) const { return std::min(rows, (block + 1) * block_rows); }
  int64_t column_begin(int64_t t) const { return t * width; }
  int64_t column_end(int64_t t) const { return std::min(columns, (t + 1) * width); }
};

}  // namespace torchbp
