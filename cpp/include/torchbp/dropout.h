// Dropout by one bit for each element: bit i % 8 of byte i / 8 tells whether element i is kept.
// One definition for the CPU and the CUDA kernels.
#pragma once
#include "torchbp/scalar.h"

namespace torchbp {

// The product with 0, so that NaN and the sign of zero come out as from a tensor of factors.
template <class A>
TORCHBP_HD A dropped(A x, uint32_t byte, int bit, A scale) {
  return x * ((byte >> bit & 1u) != 0 ? scale : A(0));
}

}  // namespace torchbp
