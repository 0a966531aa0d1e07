// Device code of the dropout kernels; cpp/tests runs it on a CPU.
#pragma once
#include "torchbp/dropout.h"

namespace torchbp {

// One thread makes a byte.
template <class K>
__global__ void dropout_bits_kernel(const K* kept, uint8_t* bits, int64_t count) {
  const int64_t step = int64_t(gridDim.x) * blockDim.x, first = blockIdx.x * int64_t(blockDim.x);
  for (int64_t i = first + threadIdx.x; i * 8 < count; i += step) {
    uint32_t byte = 0;
    for (int bit = 0; bit < 8 && i * 8 + bit < count; ++bit)
      byte |= uint32_t(kept[i * 8 + bit] != 0) << bit;
    bits[i] = uint8_t(byte);
  }
}

template <class T>
__global__ void dropout_apply_kernel(const T* x, const uint8_t* bits, T* y, int64_t count,
                                     acc_t<T> scale) {
  const int64_t step = int64_t(gridDim.x) * blockDim.x, first = blockIdx.x * int64_t(blockDim.x);
  for (int64_t i = first + threadIdx.x; i < count; i += step)
    y[i] = down<T>(dropped(up(x[i]), bits[i / 8], int(i % 8), scale));
}

}  // namespace torchbp
