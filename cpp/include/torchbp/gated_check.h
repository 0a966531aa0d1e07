// Arguments of gated, checked and laid out the same way on every device.
#pragma once
#include <optional>
#include <string>
#include <vector>

#include "torchbp/bias_act_check.h"

namespace torchbp {

// The activations that need no setting.
inline Act parse_gate(const std::string& name) {
  STD_TORCH_CHECK(name != "leaky_relu",
                  "act: expected identity, relu, gelu, gelu_tanh, silu, tanh or sigmoid, got ",
                  name);
  return parse_act(name);
}

inline void check_gated(const Tensor& value, const std::optional<Tensor>& gate) {
  if (gate) {
    check_same_shape(*gate, "gate", value, "value");
    check_alike(*gate, "gate", value, "value");
    return;
  }
  const int64_t last = value.dim() > 0 ? value.size(value.dim() - 1) : -1;
  STD_TORCH_CHECK(last >= 0 && last % 2 == 0,
                  "value: expected a last dim of even size to halve, got ", last);
}

// An empty result: shaped like the value, or like a half of it.
inline Tensor gated_result(const Tensor& value, const std::optional<Tensor>& gate) {
  if (gate) return fresh_like(value);
  std::vector<int64_t> shape(value.sizes().begin(), value.sizes().end());
  shape.back() /= 2;
  return fresh(value, shape);
}

inline void check_gated_gradient(const Tensor& grad, const Tensor& value,
                                 const std::optional<Tensor>& gate) {
  bool fits = grad.dim() == value.dim();
  for (int64_t d = 0; fits && d < grad.dim(); ++d)
    fits = grad.size(d) == (gate || d + 1 < grad.dim() ? value.size(d) : value.size(d) / 2);
  STD_TORCH_CHECK(fits, "grad_output: expected the shape of the result");
  check_alike(grad, "grad_output", value, "value");
}

// The step from row to row of a tensor that is a matrix with contiguous rows, or -1.
inline int64_t row_step(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  if (last < 1 || t.stride(last) != 1) return -1;
  for (int64_t d = 0; d + 1 < last; ++d)
    if (t.stride(d) != t.stride(d + 1) * t.size(d + 1)) return -1;
  return t.stride(last - 1);
}

// The two factors as matrices of contiguous rows. Halves of one tensor are read where they are.
struct GatedRows {
  Tensor value, gate;
  int64_t rows, width, value_step, gate_step, gate_begin;
};
inline GatedRows gated_rows(const Tensor& value, const std::optional<Tensor>& gate,
                            const Tensor& y) {
  const int64_t count = y.numel(), width = y.dim() > 0 ? y.size(y.dim() - 1) : 1;
  const int64_t rows = width > 0 ? count / width : 0;
  if (!gate) {
    const Tensor x = packed(value);
    return {x, x, rows, width, 2 * width, 2 * width, width};
  }
  const bool same = value.strides().equals(y.strides()) && gate->strides().equals(y.strides());
  if (!same && y.is_contiguous()) {
    const int64_t value_step = row_step(value), gate_step = row_step(*gate);
    if (value_step >= 0 && gate_step >= 0)
      return {value, *gate, rows, width, value_step, gate_step, 0};
  }
  return {with_strides_of(value, y), with_strides_of(*gate, y), 1, count, count, count, 0};
}

}  // namespace torchbp
