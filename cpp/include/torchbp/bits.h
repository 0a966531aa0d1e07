// Masks of one bit for each element: element i is bit i % 8 of byte i / 8.
#pragma once
#include <cstring>

#include "torchbp/scalar.h"

namespace torchbp {

TORCHBP_HD bool bit_at(const uint8_t* bits, int64_t i) { return bits[i >> 3] >> (i & 7) & 1; }

// Bits [i, i + 32) of a mask of `count` elements; those past its end are 0.
TORCHBP_HD uint32_t bits_from(const uint8_t* bits, int64_t i, int64_t count) {
  const int64_t byte = i >> 3, left = ((count + 7) >> 3) - byte;
  uint64_t word = 0;
  if (left >= 8)
    std::memcpy(&word, bits + byte, 8);
  else
    for (int64_t k = 0; k < left; ++k) word |= uint64_t(bits[byte + k]) << (8 * k);
  return uint32_t(word >> (i & 7));
}

// What dropout with probability p multiplies those by that it keeps: 1 / (1 - p), rounded as torch
// rounds its noise, to the dtype.
template <class T>
TORCHBP_HD acc_t<T> dropout_noise(double p) {
  return up(down<T>(acc_t<T>(1) / acc_t<T>(1 - p)));
}

}  // namespace torchbp
