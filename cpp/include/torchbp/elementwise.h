// g f'(x) for elementwise functions f, from what each op keeps: x, or y = f(x) where that is
// enough. One definition for the CPU and the CUDA kernels. a and b are the settings of f.
#pragma once
#include "torchbp/bias_act.h"

namespace torchbp {

enum class Fn {
  relu,
  leaky_relu,
  gelu,
  gelu_tanh,
  silu,
  tanh,
  sigmoid,
  softplus,
  log_sigmoid,
  mish,
  softsign,
  tanhshrink,
  elu,
  celu,
  selu,
  threshold,
  hardtanh,
  hardsigmoid,
  hardswish,
  hardshrink,
  softshrink
};
inline constexpr int fn_count = 21;

// tanh(log(1 + exp(x))) = n / (n + 2) with n = exp(x)^2 + 2 exp(x), by way of e = exp(-|x|).
template <class A>
TORCHBP_HD A mish_slope(A x) {
  const A e = decay(x), e2 = e * e;
  const bool below = x < A(0);
  const A n = below ? e2 + A(2) * e : A(1) + A(2) * e;  // both n and d are scaled by e^2 above 0
  const A d = below ? n + A(2) : n + A(2) * e2;
  const A gate = n / d, r = A(1) / d;
  return gate + x * (below ? e : e2) * (A(4) * (A(1) + e) * r * r);
}

template <Fn f, class A>
TORCHBP_HD A tangent(A g, A k, A a, A b) {
  if constexpr (f == Fn::relu) return backward<Act::relu>(g, k, a);
  if constexpr (f == Fn::leaky_relu) return backward<Act::leaky_relu>(g, k, a);
  if constexpr (f == Fn::gelu) return backward<Act::gelu>(g, k, a);
  if constexpr (f == Fn::gelu_tanh) return backward<Act::gelu_tanh>(g, k, a);
  if constexpr (f == Fn::silu) return backward<Act::silu>(g, k, a);
  if constexpr (f == Fn::tanh) return g * (A(1) - k * k);       // from y
  if constexpr (f == Fn::sigmoid) return g * ((A(1) - k) * k);  // from y
  if constexpr (f == Fn::softplus) {
    const A z = k * a, s = logistic(z).value;
    return z > b ? g : g * s;
  }
  if constexpr (f == Fn::log_sigmoid) return g * logistic(-k).value;
  if constexpr (f == Fn::mish) return g * mish_slope(k);
  if constexpr (f == Fn::softsign) {
    const A r = A(1) / (A(1) + magnitude(k));
    return g * (r * r);
  }
  if constexpr (f == Fn::tanhshrink) {
    const A t = hyperbolic_tangent(k);
    return g * (t * t);
  }
  if constexpr (f == Fn::elu) {
    const A e = exponential(k > A(0) ? A(0) : k);
    return k > A(0) ? g : g * (a * e);
  }
  if constexpr (f == Fn::celu) return g * exponential(k > A(0) ? A(0) : k / a);
  if constexpr (f == Fn::selu) {
    const A scale = A(1.0507009873554805), alpha = A(1.6732632423543772);
    const A e = exponential(k > A(0) ? A(0) : k);
    return g * (k > A(0) ? scale : scale * alpha * e);
  }
  if constexpr (f == Fn::threshold) return k <= a ? A(0) : g;
  if constexpr (f == Fn::hardtanh) return k <= a ? A(0) : k >= b ? A(0) : g;  // from y
  if constexpr (f == Fn::hardsigmoid)
    return k <= A(-3) ? A(0) : k >= A(3) ? A(0) : g * A(0.16666666666666667);
  if constexpr (f == Fn::hardswish) {
    const A inner = k < A(3) ? g * (k * A(0.33333333333333333) + A(0.5)) : g;
    return k <= A(-3) ? A(0) : inner;
  }
  if constexpr (f == Fn::hardshrink) return k < -a ? g : k <= a ? A(0) : g;
  if constexpr (f == Fn::softshrink) return k == A(0) ? A(0) : g;  // from y
  return g;
}

}  // namespace torchbp
