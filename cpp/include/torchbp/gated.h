// y = a f(b), the gated linear units (Dauphin et al. 2017, Shazeer 2020), and both derivatives,
// element by element. One definition for the CPU and the CUDA kernels.
#pragma once
#include "torchbp/bias_act.h"

namespace torchbp {

// f(b) and f'(b), which share their exponential.
template <class A>
struct Curve {
  A value, slope;
};
template <Act act, class A>
TORCHBP_HD Curve<A> curve(A b) {
  if constexpr (act == Act::sigmoid) {
    const Logistic<A> s = logistic(b);
    return {s.value, s.slope};
  } else if constexpr (act == Act::silu) {
    const Logistic<A> s = logistic(b);
    return {b * s.value, s.value + b * s.slope};
  } else if constexpr (act == Act::gelu) {
    const Normal<A> n = normal(b);
    return {b * n.distribution, n.distribution + b * n.density};
  } else if constexpr (act == Act::gelu_tanh) {
    const Logistic<A> s = logistic(gelu_tanh_inner(b));
    const A inner_slope = A(1.5957691216057308) * (A(1) + A(0.134145) * b * b);
    return {b * s.value, s.value + b * s.slope * inner_slope};
  } else {
    return {forward<act>(b, A(0)), backward<act>(A(1), b, A(0))};
  }
}

template <class A>
struct GatedGradients {
  A value, gate;
};
template <Act act, class A>
TORCHBP_HD GatedGradients<A> gated_gradients(A g, A a, A b) {
  const A product = g * a;
  // Where a piecewise function is flat no error passes, not even an infinite one.
  if constexpr (act == Act::relu)
    return {g * forward<act>(b, A(0)), backward<act>(product, b, A(0))};
  const Curve<A> f = curve<act>(b);
  return {g * f.value, product * f.slope};
}

}  // namespace torchbp
