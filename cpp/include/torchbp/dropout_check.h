// Arguments of the dropout kernels, checked the same way on every device.
#pragma once
#include "torchbp/tensor.h"

namespace torchbp {

// Calls f with a value of the type of `kept`, whose elements are 0 or 1.
template <class F>
void with_flag(const Tensor& kept, F&& f) {
  switch (kept.scalar_type()) {
    case ScalarType::Int: return f(int32_t{});
    case ScalarType::Bool:
    case ScalarType::Byte: return f(uint8_t{});
    default:
      STD_TORCH_CHECK(false, "kept: expected int32, uint8 or bool, got ",
                      torch::headeronly::toString(kept.scalar_type()));
  }
}

inline void check_bits(const Tensor& x, const Tensor& bits) {
  STD_TORCH_CHECK(bits.scalar_type() == ScalarType::Byte, "bits: expected uint8, got ",
                  torch::headeronly::toString(bits.scalar_type()));
  STD_TORCH_CHECK(bits.dim() == 1 && bits.size(0) == ceil_div(x.numel(), 8),
                  "bits: expected one for each element of x, that is ", ceil_div(x.numel(), 8),
                  " bytes, got ", bits.numel(), " in ", bits.dim(), " dims");
  STD_TORCH_CHECK(bits.device() == x.device(), "bits: expected the device of x");
}

}  // namespace torchbp
