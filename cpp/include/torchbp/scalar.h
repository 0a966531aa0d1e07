// The four element types, and how they go to and from the type that sums are kept in.
// Integer arithmetic only, so that the compiler can vectorise every conversion.
#pragma once
#include <bit>
#include <cstdint>
#if defined(__CUDACC__)
#include <cuda_fp16.h>
#define TORCHBP_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define TORCHBP_HD inline __attribute__((always_inline))
#else
#define TORCHBP_HD inline
#endif

namespace torchbp {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class T>
struct accumulate {
  using type = float;
};
template <>
struct accumulate<double> {
  using type = double;
};
// float64 sums in float64; everything else in float32.
template <class T>
using acc_t = typename accumulate<T>::type;

TORCHBP_HD double up(double v) { return v; }
TORCHBP_HD float up(float v) { return v; }
TORCHBP_HD float up(bf16 v) { return std::bit_cast<float>(uint32_t(v.bits) << 16); }
TORCHBP_HD float up(f16 v) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(v.bits));
#else
  // Moving the 15 value bits up leaves an exponent that is 112 too small; the product mends it, and
  // is exact for subnormal numbers too. Infinity and NaN need the exponent of all ones put back.
  const uint32_t value = uint32_t(v.bits & 0x7fff) << 13;
  const uint32_t finite = std::bit_cast<uint32_t>(std::bit_cast<float>(value) * 0x1p112f);
  const uint32_t special = (v.bits & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;
  return std::bit_cast<float>(finite | special | uint32_t(v.bits & 0x8000) << 16);
#endif
}

template <class T>
TORCHBP_HD T down(acc_t<T> v) {
  return v;
}
template <>
TORCHBP_HD bf16 down<bf16>(float v) {
  const uint32_t u = std::bit_cast<uint32_t>(v);
  const uint32_t nearest_even = (u + 0x7fff + (u >> 16 & 1)) >> 16;
  return {uint16_t((u & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : nearest_even)};
}
template <>
TORCHBP_HD f16 down<f16>(float v) {
#if defined(__CUDA_ARCH__)
  return {__half_as_ushort(__float2half_rn(v))};
#else
  const uint32_t u = std::bit_cast<uint32_t>(v), a = u & 0x7fffffff;
  const uint32_t normal = (a - 0x38000000 + 0xfff + (a >> 13 & 1)) >> 13;
  // Adding 0.5 aligns a subnormal result with the low bits, and rounds it to nearest even.
  const uint32_t subnormal = std::bit_cast<uint32_t>(std::bit_cast<float>(a) + 0.5f) - 0x3f000000;
  uint32_t h = a < 0x38800000 ? subnormal : normal;
  h = a >= 0x477ff000 ? 0x7c00 : h;  // 65520 and above round to infinity
  h = a > 0x7f800000 ? 0x7e00 : h;
  return {uint16_t(h | (u >> 16 & 0x8000))};
#endif
}

}  // namespace torchbp
