// Cross-entropy of one row of logits z with the class y, the weights w (ones if there are none),
// label smoothing e (Szegedy et al., 2016) and z-loss zeta (Chowdhery et al., 2022):
//
//   l = w_y ((1 - e) c + zeta lse^2) + e / C sum_k w_k (lse - z_k),    c = lse - z_y
//
// With m the largest of the other logits and r = sum over k != y of exp(z_k - m), the log-odds of
// the class, s = log(p_y / (1 - p_y)) = z_y - m - log r, give c = softplus(-s) with all its digits,
// however close p_y is to one: y never enters a sum that it would have to be taken out of again.
// Running m and r along needs the logits only once (Milakov and Gimelshein, 2018).
#pragma once
#include <limits>

#include "torchbp/elementary.h"

namespace torchbp {

enum class Reduction { none, mean, sum };

// exp(x) for x <= 0, and exactly 0 where the result would not be a normal number: of a sum of which
// one term is 1 such terms are no part. With 1 + p in (1/2, 2), 2^n is a sum of exponents. NaN is
// returned as it came: the sum could make a number of one whose low bits are set.
TORCHBP_HD float exp_below_zero(float x) {
  const float shifted = (x < -87.f ? -87.f : x) * 1.44269504f + 0x1.8p23f;
  const float n = shifted - 0x1.8p23f, y = x < -87.f ? -87.f : x;
  const float r = (y - n * 0.693359375f) + n * 2.12194440e-4f;  // log(2) in two parts
  float p = 1.381459848e-3f;  // the coefficients are those of power_of_sum
  p = p * r + 8.368716887e-3f;
  p = p * r + 4.166838805e-2f;
  p = p * r + 1.666652063e-1f;
  p = p * r + 4.999999345e-1f;
  p = p * r * r + r + 1.f;
  const float value =
      std::bit_cast<float>(std::bit_cast<uint32_t>(p) + (std::bit_cast<uint32_t>(shifted) << 23));
  return x < -87.f ? 0.f : x == x ? value : x;
}
#if defined(__CUDACC__)
TORCHBP_HD double exp_below_zero(double x) { return ::exp(x); }
#else
// Taylor's polynomial of degree 13 has error 5e-18 on |r| <= log(2) / 2.
TORCHBP_HD double exp_below_zero(double x) {
  const double y = x < -708. ? -708. : x;
  const double shifted = y * 1.4426950408889634 + 0x1.8p52, n = shifted - 0x1.8p52;
  const double r = (y - n * 0x1.62e42feep-1) - n * 0x1.a39ef35793c76p-33;  // log(2) in two parts
  double p = 1. / 6227020800;
  p = p * r + 1. / 479001600;
  p = p * r + 1. / 39916800;
  p = p * r + 1. / 3628800;
  p = p * r + 1. / 362880;
  p = p * r + 1. / 40320;
  p = p * r + 1. / 5040;
  p = p * r + 1. / 720;
  p = p * r + 1. / 120;
  p = p * r + 1. / 24;
  p = p * r + 1. / 6;
  p = p * r + 0.5;
  p = p * r * r + r + 1.;
  const double value =
      std::bit_cast<double>(std::bit_cast<uint64_t>(p) + (std::bit_cast<uint64_t>(shifted) << 52));
  return x < -708. ? 0. : x == x ? value : x;
}
#endif

// What is the same for every row.
template <class A>
struct LossSettings {
  int64_t classes, ignore_index;
  double smoothing, z_loss, weight_sum;  // of the class weights: C if there are none
};

// What one look at a row gives.
template <class A>
struct RowSums {
  static constexpr A lowest = -std::numeric_limits<A>::infinity();
  A own;               // z_y
  A shift;             // z_y where it is finite: differences keep the digits of large logits
  A most = lowest;     // m
  double rest = 0;     // r
  double shifted = 0;  // sum over k != y of w_k (z_k - shift); with label smoothing only

  TORCHBP_HD explicit RowSums(A z) : own(z), shift(z - z == A(0) ? z : A(0)) {}
};
// What exponents are taken relative to, so that minus infinity goes to zero.
template <class A>
TORCHBP_HD A origin(A most) {
  return most == RowSums<A>::lowest ? A(0) : most;
}

template <class A>
struct RowLoss {
  A loss, log_odds;
};
template <class A>
TORCHBP_HD RowLoss<A> row_loss(const RowSums<A>& row, double own_weight, const LossSettings<A>& q) {
  const double own = double(row.own), s = own - double(row.most) - ::log(row.rest);
  double c = s > 0 ? ::log1p(::exp(-s)) : ::log1p(::exp(s)) - s;
  if (row.own == -RowSums<A>::lowest) c = own - own;  // NaN, as in torch
  // The first keeps the digits that large logits would cost.
  const double lse = own - own == 0 ? c + own : double(row.most) + ::log(row.rest);
  double loss = own_weight * (1 - q.smoothing) * c;
  if (q.z_loss != 0) loss += own_weight * q.z_loss * lse * lse;
  if (q.smoothing != 0) {
    const double shifted = row.shifted + own_weight * double(row.own - row.shift);
    loss += q.smoothing / double(q.classes) * (q.weight_sum * (lse - double(row.shift)) - shifted);
  }
  return {A(loss), A(s)};
}

// dl/dz_k = slope exp(z_k - m) - share w_k for k != y, and `own` for y.
template <class A>
struct RowGradient {
  A slope, share, own;
};
template <class A>
TORCHBP_HD RowGradient<A> row_gradient(const RowSums<A>& row, double g, double own_weight,
                                       const LossSettings<A>& q) {
  const double own = double(row.own);
  // NaN where the own logit is plus infinity, as in torch.
  const double gap = own - (row.own == -RowSums<A>::lowest ? own : double(row.most));
  const double e = ::exp(gap > 700 ? 700. : gap), total = row.rest + e;  // no other class: e = inf
  const double hit = g * own_weight * (1 - q.smoothing);
  const double share = q.smoothing == 0 ? 0 : g * q.smoothing / double(q.classes);
  double others = share * q.weight_sum;
  if (q.z_loss != 0) {
    const double lse = row.rest == 0 ? own : double(row.most) + (gap > 700 ? gap : ::log(total));
    others += 2 * g * own_weight * q.z_loss * lse;
  }
  const double at_own = others * (e / total) - hit * (row.rest / total) - share * own_weight;
  return {A((hit + others) / total), A(share), A(at_own)};
}

}  // namespace torchbp
