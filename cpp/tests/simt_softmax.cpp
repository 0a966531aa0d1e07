// softmax.cu on the CPU; see simt.h.
#include "cuda/softmax.cuh"

using namespace torchbp;

extern "C" {

void backward(int64_t dtype, bool logarithm, const void* g, const void* y, void* grad, int64_t rows,
              int64_t width) {
  simt::with_scalar(dtype, [&](auto scalar) {
    using T = decltype(scalar);
    const auto kernel = logarithm ? softmax_kernel<true, T> : softmax_kernel<false, T>;
    simt::launch({3}, {softmax_lanes}, kernel, static_cast<const T*>(g), static_cast<const T*>(y),
                 static_cast<T*>(grad), rows, width);
  });
}
}
