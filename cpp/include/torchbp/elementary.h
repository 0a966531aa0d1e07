// exp, expm1, log1p, tanh and the normal distribution without branches or library calls, so that
// loops vectorise. The float32 polynomials are our own minimax fits (Lawson's iteration on
// Chebyshev nodes); each states the relative error of the exact polynomial. float64 uses the C++
// library.
#pragma once
#include <cmath>

#include "torchbp/scalar.h"

namespace torchbp {

// exp(x + small) = (1 + fraction) 2^exponent with |fraction| < 0.42, for x in [-104, 89] and
// |small| << 1, which lets a caller pass an argument that one float cannot hold exactly. The
// remainder polynomial has error 3e-9 on |r| <= log(2) / 2.
struct Power {
  float fraction;
  int32_t exponent;
};
TORCHBP_HD Power power_of_sum(float x, float small) {
  const float shifted = x * 1.44269504f + 0x1.8p23f;  // the low mantissa bits hold round(x / log 2)
  const float n = shifted - 0x1.8p23f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f + small;  // log(2) in two parts
  float p = 1.381459848e-3f;
  p = p * r + 8.368716887e-3f;
  p = p * r + 4.166838805e-2f;
  p = p * r + 1.666652063e-1f;
  p = p * r + 4.999999345e-1f;
  return {p * r * r + r, int32_t(std::bit_cast<uint32_t>(shifted) - 0x4b400000u)};
}
// 2^k for k in [-126, 127]
TORCHBP_HD float power_of_two(int32_t k) { return std::bit_cast<float>(uint32_t(k + 127) << 23); }

TORCHBP_HD float exp_of_sum(float x, float small) {
  const Power p = power_of_sum(x, small);
  // 2^k in two factors reaches every subnormal, and infinity.
  const int32_t half = p.exponent >> 1;
  return (p.fraction + 1.f) * power_of_two(half) * power_of_two(p.exponent - half);
}
// The bounds give exactly 0 and infinity; NaN stays.
TORCHBP_HD float exponential(float x) {
  return exp_of_sum(x < -104.f ? -104.f : x > 89.f ? 89.f : x, 0.f);
}
TORCHBP_HD double exponential(double x) { return ::exp(x); }

// exp(x) - 1 for x <= 88
TORCHBP_HD float exp_minus_one(float x) {
  const Power p = power_of_sum(x < -18.f ? -18.f : x, 0.f);
  const float scale = power_of_two(p.exponent);
  return p.fraction * scale + (scale - 1.f);
}
TORCHBP_HD double exp_minus_one(double x) { return ::expm1(x); }

// log(1 + z) for -1 < z < 2^126. With 1 + z = (1 + f) 2^k and |f| <= 1/3, f comes from z itself, so
// that it keeps the digits that 1 + z drops. The polynomial has error 5e-9.
TORCHBP_HD float log_one_plus(float z) {
  const uint32_t above = std::bit_cast<uint32_t>(1.f + z) - 0x3f2aaaabu;  // the bits of 2/3
  const int32_t k = int32_t(above) >> 23;
  const float scale = power_of_two(-k), f = z * scale + (scale - 1.f), n = float(k);
  float p = -1.289160091e-1f;
  p = p * f + 1.398446719e-1f;
  p = p * f - 1.218427781e-1f;
  p = p * f + 1.400586253e-1f;
  p = p * f - 1.668048642e-1f;
  p = p * f + 2.001040633e-1f;
  p = p * f - 2.499979768e-1f;
  p = p * f + 3.333321598e-1f;
  const float small = n * -2.12194440e-4f + f * f * (p * f - 0.5f);  // log(2) in two parts
  return n * 0.693359375f + (small + f);
}
TORCHBP_HD double log_one_plus(double z) { return ::log1p(z); }

TORCHBP_HD float magnitude(float x) {
  return std::bit_cast<float>(std::bit_cast<uint32_t>(x) & 0x7fffffffu);
}
TORCHBP_HD double magnitude(double x) {
  return std::bit_cast<double>(std::bit_cast<uint64_t>(x) & 0x7fffffffffffffffull);
}

// exp(-|x|)
TORCHBP_HD float decay(float x) {
  const float u = magnitude(x);
  return exp_of_sum(u > 104.f ? -104.f : -u, 0.f);
}
TORCHBP_HD double decay(double x) { return ::exp(-magnitude(x)); }

// An odd polynomial of error 4e-9 where the quotient of exponentials would cancel.
TORCHBP_HD float hyperbolic_tangent(float x) {
  const float u = magnitude(x), z = x * x;
  float p = -5.743003748e-3f;
  p = p * z + 2.067148026e-2f;
  p = p * z - 5.374911830e-2f;
  p = p * z + 1.333154819e-1f;
  p = p * z - 3.333328558e-1f;
  const float near = x + x * z * p;
  const float far = 1.f - 2.f / (exponential(2.f * u) + 1.f);
  return u < 0.62f ? near : x < 0.f ? -far : far;
}
TORCHBP_HD double hyperbolic_tangent(double x) { return ::tanh(x); }

// Phi (distribution) and phi (density) of the standard normal law.
template <class A>
struct Normal {
  A distribution, density;
};

// Phi(-u) = exp(-u^2 / 2) Q(u): the scaled tail Q is a polynomial in s = (3 - u) / (3 + u) times
// 1 + s (error 5e-8), after Shepherd and Laframboise, 1981. The square u^2 is split so that the
// tail keeps its relative accuracy.
TORCHBP_HD Normal<float> normal(float z) {
  float u = magnitude(z);
  u = u > 14.4f ? 14.4f : u;  // Phi(-14.4) is 0 in float32
  const float head = std::bit_cast<float>(std::bit_cast<uint32_t>(u) & 0xfffff000u);
  const float gauss = exp_of_sum(-0.5f * head * head, -0.5f * (u - head) * (u + head));
  const float r = 1.f / (3.f + u), s = (3.f - u) * r;
  float q = -4.383152318e-5f;
  q = q * s + 1.496257148e-4f;
  q = q * s + 1.791219645e-4f;
  q = q * s - 1.153334430e-3f;
  q = q * s - 1.746682198e-3f;
  q = q * s + 7.875880853e-3f;
  q = q * s + 3.833656642e-2f;
  q = q * s + 8.488872137e-2f;
  q = q * s + 1.215139447e-1f;
  const float tail = gauss * q * 6.f * r;  // 1 + s = 6 / (3 + u)
  return {z < 0.f ? tail : 1.f - tail, 0.398942280f * gauss};
}
TORCHBP_HD Normal<double> normal(double z) {
  return {0.5 * ::erfc(-0.70710678118654752440 * z), 0.39894228040143267794 * ::exp(-0.5 * z * z)};
}

}  // namespace torchbp
