// y = act(z), z = x + bias, and its derivative, element by element.
// One definition for the CPU and the CUDA kernels. Written so that no tail loses relative accuracy:
// differences of nearly equal numbers are replaced by exp(-|.|), which both sides share.
#pragma once
#include "torchbp/elementary.h"

namespace torchbp {

enum class Act { identity, relu, leaky_relu, gelu, gelu_tanh, silu, tanh, sigmoid };
inline constexpr const char* act_names[] = {"identity",  "relu", "leaky_relu", "gelu",
                                            "gelu_tanh", "silu", "tanh",       "sigmoid"};
inline constexpr int act_count = 8;

// The logistic function s(x), with s'(x) = s (1 - s) free of cancellation.
template <class A>
struct Logistic {
  A value, slope;
};
template <class A>
TORCHBP_HD Logistic<A> logistic(A x) {
  const A e = decay(x), r = A(1) / (A(1) + e);
  return {x < A(0) ? e * r : r, e * r * r};
}

// gelu_tanh(z) = z s(w(z)) with w(z) = 2 sqrt(2 / pi) (z + 0.044715 z^3): Hendrycks, Gimpel 2016.
template <class A>
TORCHBP_HD A gelu_tanh_inner(A z) {
  return A(1.5957691216057308) * z * (A(1) + A(0.044715) * z * z);
}

template <Act act, class A>
TORCHBP_HD A forward(A z, A alpha) {
  if constexpr (act == Act::relu) return z <= A(0) ? A(0) : z;
  if constexpr (act == Act::leaky_relu) return z > A(0) ? z : alpha * z;
  if constexpr (act == Act::gelu) return z * normal(z).distribution;
  if constexpr (act == Act::gelu_tanh) return z / (A(1) + exponential(-gelu_tanh_inner(z)));
  if constexpr (act == Act::silu) return z / (A(1) + exponential(-z));
  if constexpr (act == Act::tanh) return hyperbolic_tangent(z);
  if constexpr (act == Act::sigmoid) return A(1) / (A(1) + exponential(-z));
  return z;
}

// The gradient with respect to z, given g = dL/dy.
template <Act act, class A>
TORCHBP_HD A backward(A g, A z, A alpha) {
  if constexpr (act == Act::relu) return z <= A(0) ? A(0) : g;
  if constexpr (act == Act::leaky_relu) return z > A(0) ? g : alpha * g;
  if constexpr (act == Act::gelu) {
    const Normal<A> n = normal(z);
    return g * (n.distribution + z * n.density);
  }
  if constexpr (act == Act::gelu_tanh) {
    const Logistic<A> s = logistic(gelu_tanh_inner(z));
    const A inner_slope = A(1.5957691216057308) * (A(1) + A(0.134145) * z * z);
    return g * (s.value + z * s.slope * inner_slope);
  }
  if constexpr (act == Act::silu) {
    const Logistic<A> s = logistic(z);
    return g * (s.value + z * s.slope);
  }
  if constexpr (act == Act::tanh) return g * (A(4) * logistic(A(2) * z).slope);  // 1 - tanh^2
  if constexpr (act == Act::sigmoid) return g * logistic(z).slope;
  return g;
}

}  // namespace torchbp
