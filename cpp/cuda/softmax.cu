#include <torch/csrc/stable/library.h>

#include "cuda/launch.h"
#include "cuda/softmax.cuh"
#include "torchbp/softmax_check.h"

namespace torchbp {

static Tensor softmax_backward_cuda(const Tensor& grad_, const Tensor& output_, bool logarithm) {
  check_softmax(grad_, output_);
  const torch::stable::accelerator::DeviceGuard guard(output_.get_device_index());
  const Tensor grad = torch::stable::contiguous(grad_), y = torch::stable::contiguous(output_);
  const Tensor result = torch::stable::empty_like(y);
  const int64_t count = y.numel(), width = row_width(y);
  with_scalar(y.scalar_type(), "output", [&](auto scalar) {
    using T = decltype(scalar);
    if (count == 0) return;
    const int64_t rows = count / width;
    const auto kernel = logarithm ? softmax_kernel<true, T> : softmax_kernel<false, T>;
    kernel<<<unsigned(std::min<int64_t>(rows, 1 << 20)), softmax_lanes, 0, current_stream(y)>>>(
        input<T>(grad), input<T>(y), output<T>(result), rows, width);
    check_launch("softmax_backward");
  });
  return result;
}

}  // namespace torchbp

STABLE_TORCH_LIBRARY_IMPL(torchbp, CUDA, m) {
  m.impl("softmax_backward", TORCH_BOX(&torchbp::softmax_backward_cuda));
}
