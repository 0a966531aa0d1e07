// Arguments of elementwise_backward, checked the same way on every device.
#pragma once
#include "torchbp/elementwise.h"
#include "torchbp/tensor.h"

namespace torchbp {

inline void check_elementwise(const Tensor& grad_output, const Tensor& kept, int64_t function) {
  STD_TORCH_CHECK(function >= 0 && function < fn_count, "function: expected a number below ",
                  fn_count, ", got ", function);
  check_same_shape(grad_output, "grad_output", kept, "kept");
  check_alike(grad_output, "grad_output", kept, "kept");
}

}  // namespace torchbp
