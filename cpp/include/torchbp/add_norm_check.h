// Arguments of add_norm and its backward pass, checked the same way on every device.
#pragma once
#include "torchbp/norm_check.h"

namespace torchbp {

// A mask of one bit for each element of x; see bits.h.
inline void check_mask(const Optional& mask, const Tensor& x) {
  if (!mask) return;
  const int64_t bytes = ceil_div(x.numel(), 8);
  STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Byte, "mask: expected uint8, got ",
                  torch::headeronly::toString(mask->scalar_type()));
  STD_TORCH_CHECK(mask->numel() == bytes, "mask: expected ", bytes, " bytes, got ", mask->numel());
  STD_TORCH_CHECK(mask->device() == x.device(), "mask: expected the device of x");
}

inline RowShape check_add_norm(const Tensor& x, const Optional& residual, const Optional& mask,
                               const Optional& weight, const Optional& bias, int64_t dims) {
  const RowShape shape(x, dims);
  if (residual) {
    check_same_shape(*residual, "residual", x, "x");
    check_alike(*residual, "residual", x, "x");
  }
  check_mask(mask, x);
  STD_TORCH_CHECK(!mask || residual, "mask: expected a residual beside it");
  check_parameter(weight, "weight", shape.columns, x);
  check_parameter(bias, "bias", shape.columns, x);
  return shape;
}

inline RowShape check_add_norm_backward(const Tensor& grad_output, const Optional& grad_sum,
                                        const Tensor& sum, const Optional& mean, const Tensor& rstd,
                                        const Optional& weight, const Optional& mask,
                                        int64_t dims) {
  const RowShape shape = check_layer_norm(grad_output, sum, mean, rstd, weight, dims);
  if (grad_sum) {
    check_same_shape(*grad_sum, "grad_sum", sum, "x");
    check_alike(*grad_sum, "grad_sum", sum, "x");
  }
  check_mask(mask, sum);
  return shape;
}

}  // namespace torchbp
