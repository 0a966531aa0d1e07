// Arguments of softmax_backward, checked the same way on every device.
#pragma once
#include "torchbp/tensor.h"

namespace torchbp {

inline void check_softmax(const Tensor& grad_output, const Tensor& output) {
  check_same_shape(grad_output, "grad_output", output, "output");
  check_alike(grad_output, "grad_output", output, "output");
}
inline int64_t row_width(const Tensor& t) { return t.dim() > 0 ? t.size(t.dim() - 1) : 1; }

}  // namespace torchbp
