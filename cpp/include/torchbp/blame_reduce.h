// What one element of an activation and its error signal adds to the sums of its unit.
// One definition for the CPU and the CUDA kernels.
#pragma once
#include "torchbp/scalar.h"

namespace torchbp {

inline constexpr int stat_count = 3;     // zeros, sum of a^2, sum of delta^2
inline constexpr int blame_tile = 1024;  // units whose sums a CPU task keeps side by side

template <class A>
struct Terms {
  A contribution, zeros, activation_square, error_square;
};
template <bool gradient, class A>
TORCHBP_HD Terms<A> terms(A a, A delta) {
  return {gradient ? delta : a * delta, a == A(0) ? A(1) : A(0), a * a, delta * delta};
}

// Element (n, p, u) of a tensor of N samples, P positions and U units.
struct Strides {
  int64_t n, p, u;
};

}  // namespace torchbp
