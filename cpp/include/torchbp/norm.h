// The backward pass of y = (x - mean) r w + b where mean and r = (variance + eps)^-1/2 are taken
// over n elements. With c = x - mean and v = g w (Ioffe, Szegedy 2015; Ba et al. 2016):
//
//   grad_x = r v - r sum(v) / n - r^3 sum(v c) / n c,   grad_w = sum of g c r,   grad_b = sum of g.
//
// One definition for every norm: layer norm takes its sums along rows, batch, group and instance
// norm along channels. Without a mean the second term is left out (Zhang, Sennrich 2019).
#pragma once
#include "torchbp/scalar.h"

namespace torchbp {

// grad_x = scale v + slope c + shift
template <class A>
struct NormGradient {
  A scale, slope, shift;
};

template <class A>
TORCHBP_HD NormGradient<A> norm_gradient(double rstd, double sum, double product, double n) {
  const double share = -rstd / n;
  return {A(rstd), A(share * rstd * rstd * product), A(share * sum)};
}

template <class A>
TORCHBP_HD A apply(const NormGradient<A>& q, A v, A centred) {
  return q.scale * v + (q.slope * centred + q.shift);
}

}  // namespace torchbp
