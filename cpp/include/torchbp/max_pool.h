// Max pooling over one to three dimensions, and what its backward pass reads: for every window,
// which of its elements (its taps, numbered in the order of memory) is the maximum.
#pragma once
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "torchbp/scalar.h"

namespace torchbp {

// Depth, height and width; dimensions that a tensor lacks come first and have size 1.
struct Pool {
  int64_t samples, channels;
  int64_t in[3], out[3], kernel[3], stride[3], padding[3], dilation[3];

  TORCHBP_HD int64_t taps() const { return kernel[0] * kernel[1] * kernel[2]; }
  // From the first element of a window to its last.
  TORCHBP_HD int64_t reach(int d) const { return (kernel[d] - 1) * dilation[d]; }
  // The first element of window o, which may be one of the padding.
  TORCHBP_HD int64_t begin(int d, int64_t o) const { return o * stride[d] - padding[d]; }
  // The first tap of window o that is not one of the padding.
  TORCHBP_HD int64_t first_tap(int d, int64_t o) const {
    const int64_t before = -begin(d, o);
    return before > 0 ? (before + dilation[d] - 1) / dilation[d] : 0;
  }
  // The same of all dimensions, as a tap number.
  TORCHBP_HD int64_t first_tap(int64_t d, int64_t h, int64_t w) const {
    return (first_tap(0, d) * kernel[1] + first_tap(1, h)) * kernel[2] + first_tap(2, w);
  }
};

// As torch decides: the first of equal elements, and the last NaN if there is one.
template <class A>
TORCHBP_HD bool beats(A value, A best) {
  return value > best || value != value;
}

// Tap numbers are kept in a byte up to this many taps, in an int32 beyond.
inline constexpr int64_t most_short_taps = 256;

// Tap numbers beside values of type A, of the same width.
template <class A>
using tap_t = std::conditional_t<std::is_same_v<A, double>, int64_t, int32_t>;

// Where the samples and positions of a tensor with channels next to each other lie.
struct Steps {
  int64_t sample, step[3];

  TORCHBP_HD int64_t at(int64_t n, int64_t d, int64_t h, int64_t w) const {
    return n * sample + d * step[0] + h * step[1] + w * step[2];
  }
};

// For contiguous tensors, and for tensors with channels next to each other. O is uint8_t or
// int32_t.
template <class T, class O>
void planes_forward(const Pool&, const T* x, T* y, O* offsets);
template <class T, class O>
void planes_backward(const Pool&, const T* grad_output, const O* offsets, T* grad_input);
template <class T, class O>
void channels_forward(const Pool&, const T* x, const Steps&, T* y, O* offsets, const Steps&);
template <class T, class O>
void channels_backward(const Pool&, const T* grad_output, const Steps&, const O* offsets,
                       const Steps&, T* grad_input, const Steps&);

}  // namespace torchbp
