// Device code of gated; cpp/tests runs it on a CPU.
#pragma once
#include "torchbp/gated.h"

namespace torchbp {

// The factors are matrices of `width` columns; their rows lie `value_step` and `gate_step` apart.
template <Act act, class T>
__global__ void gated_kernel(const T* value, const T* gate, T* y, int64_t count, int64_t width,
                             int64_t value_step, int64_t gate_step) {
  const int64_t step = int64_t(gridDim.x) * blockDim.x, first = blockIdx.x * int64_t(blockDim.x);
  for (int64_t i = first + threadIdx.x; i < count; i += step) {
    const int64_t row = i / width, column = i - row * width;
    const acc_t<T> b = up(gate[row * gate_step + column]);
    y[i] = down<T>(up(value[row * value_step + column]) * forward<act>(b, acc_t<T>(0)));
  }
}

// The rows of both gradients lie `grad_step` apart.
template <Act act, class T>
__global__ void gated_backward_kernel(const T* g, const T* value, const T* gate, T* of_value,
                                      T* of_gate, int64_t count, int64_t width, int64_t value_step,
                                      int64_t gate_step, int64_t grad_step) {
  const int64_t step = int64_t(gridDim.x) * blockDim.x, first = blockIdx.x * int64_t(blockDim.x);
  for (int64_t i = first + threadIdx.x; i < count; i += step) {
    const int64_t row = i / width, column = i - row * width;
    const auto grads = gated_gradients<act>(up(g[i]), up(value[row * value_step + column]),
                                            up(gate[row * gate_step + column]));
    of_value[row * grad_step + column] = down<T>(grads.value);
    of_gate[row * grad_step + column] = down<T>(grads.gate);
  }
}

}  // namespace torchbp
