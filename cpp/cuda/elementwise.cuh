// Device code of elementwise_backward; cpp/tests runs it on a CPU.
#pragma once
#include "torchbp/elementwise.h"

namespace torchbp {

template <Fn f, class T>
__global__ void tangent_kernel(const T* g, const T* kept, T* grad, int64_t count, acc_t<T> a,
                               acc_t<T> b) {
  const int64_t step = int64_t(gridDim.x) * blockDim.x, first = blockIdx.x * int64_t(blockDim.x);
  for (int64_t i = first + threadIdx.x; i < count; i += step)
    grad[i] = down<T>(tangent<f>(up(g[i]), up(kept[i]), a, b));
}

}  // namespace torchbp
