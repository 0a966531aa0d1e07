// Blame of a unit, from its first-order blame t and the loss l of the sample; see
// torchbp/blame/definitions.py. One definition for the CPU and the CUDA kernels.
//
// The log-odds link: with r = 1 - exp(-l) and u = t / r, b = -log(exp(-l) + r exp(-u)) <= l.
//   low loss   b = -log1p(r expm1(-u)), which cancels where both u and l are large;
//   high loss  b = u - log1p(exp(-l) expm1(u)), the same with exp(-u) taken out of the logarithm.
// A term below exp(-span) of its neighbour does not count, which bounds every argument of exp.
#pragma once
#include <limits>

#include "torchbp/elementary.h"

namespace torchbp {

enum class BlameKind { taylor, log_odds, squared };
enum class Form { linear, low_loss, high_loss, squared };

template <class A>
struct LinkRange;
template <>
struct LinkRange<float> {
  static constexpr float span = 17, tiny = 1e-30f;
};
template <>
struct LinkRange<double> {
  static constexpr double span = 37, tiny = 1e-290;
};

// What all units of one sample share.
template <class A>
struct Sample {
  Form form = Form::linear;
  A loss = 0;
  A factor = 0;     // low: -1 / r; high: 1 / r; squared: 4 l
  A amplitude = 0;  // the factor of expm1
  A most = 0;       // where u (low: -u) is cut off
  A shift = 0, least = 0;
  // log-odds, near u = 0: b = t (1 + u (c[0] + u (c[1] + u (c[2] + u c[3])))) with u = near t, the
  // cumulants of a Bernoulli variable (Cramer, 1946). Its error is u^5 / 720 at most.
  A near = std::numeric_limits<A>::infinity(), c[4] = {};  // infinity: no element is near
};
// The largest |u| that the series holds for: 4e-8 are below the rounding of float32. float64 does
// without it.
inline constexpr float near_limit = 0.125f;

// Adds the series to a sample; r = 1 - exp(-l) > 0.
template <class A>
TORCHBP_HD Sample<A> with_series(Sample<A> s, A r) {
  const A q = exponential(-s.loss), rq = r * q;
  s.near = A(1) / r;
  s.c[0] = A(-0.5) * q;
  s.c[1] = A(1) / A(6) * q * (A(1) - A(2) * r);
  s.c[2] = A(-1) / A(24) * q * (A(1) - A(6) * rq);
  s.c[3] = A(1) / A(120) * q * (A(1) - A(2) * r) * (A(1) - A(12) * rq);
  return s;
}

template <class A>
TORCHBP_HD Sample<A> sample_of(BlameKind kind, A loss) {
  constexpr A infinity = std::numeric_limits<A>::infinity();
  constexpr A span = LinkRange<A>::span, tiny = LinkRange<A>::tiny;
  if (kind == BlameKind::squared && loss > A(0)) return {Form::squared, loss, A(4) * loss};
  if (kind != BlameKind::log_odds) return {};
  if (loss <= A(0)) return {Form::low_loss, loss, A(0), A(0), infinity};
  A r = -exp_minus_one(-loss);
  if (loss > A(2)) {
    // Where l > span, exp(-l) expm1(u) is exp(-span) expm1(u - (l - span)), or next to nothing.
    const bool far = loss > span;
    return with_series<A>({Form::high_loss, loss, A(1) / r, exponential(far ? -span : -loss),
                           loss + span, far ? loss - span : A(0), far ? A(0) : -infinity},
                          r);
  }
  r = r < tiny ? tiny : r;  // smaller losses pass for this one; 1 / r and exp stay finite
  return with_series<A>({Form::low_loss, loss, A(-1) / r, r, span - std::log(r)}, r);
}

// b by the series, for |u| <= near_limit.
template <class A>
TORCHBP_HD A near_blame(const Sample<A>& s, A t) {
  const A u = t * s.near;
  return t * (A(1) + u * (s.c[0] + u * (s.c[1] + u * (s.c[2] + u * s.c[3]))));
}

// NaN passes every comparison on the side that keeps it.
template <Form form, class A>
TORCHBP_HD A blame(const Sample<A>& s, A t) {
  if constexpr (form == Form::linear) return t;
  if constexpr (form == Form::squared) return t - t * t / s.factor;
  A b;
  if constexpr (form == Form::low_loss) {
    const A g = t * s.factor, x = g > s.most ? s.most : g;
    b = (g > s.most ? s.most - g : A(0)) - log_one_plus(s.amplitude * exp_minus_one(x));
  } else {
    const A v = t * s.factor, u = v > s.most ? s.most : v, d = u - s.shift;
    b = u - log_one_plus(s.amplitude * exp_minus_one(d > s.least ? d : s.least));
  }
  return b > s.loss ? s.loss : b;
}

}  // namespace torchbp
