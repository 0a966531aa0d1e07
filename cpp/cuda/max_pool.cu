#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cuda/launch.h"
#include "cuda/max_pool.cuh"
#include "torchbp/max_pool_check.h"

namespace torchbp {

static Placement placement(const Tensor& t, int64_t dims, bool last) {
  const int64_t first = t.dim() - dims;
  Placement p{first == 2 ? t.stride(0) : 0, t.stride(first - 1), {0, 0, 0}, last};
  for (int64_t d = 0; d < dims; ++d) p.step[3 - dims + d] = t.stride(first + d);
  return p;
}

static std::tuple<Tensor, Tensor> max_pool_cuda(const Tensor& x, Sizes kernel, Sizes stride,
                                                Sizes padding, Sizes dilation, bool ceil_mode) {
  const Pool q = check_max_pool(x, kernel, stride, padding, dilation, ceil_mode);
  const int64_t dims = int64_t(kernel.size());
  const bool last = channels_last(x, dims);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Sizes shape = pooled_shape(x, q, dims);
  const Tensor y = pooled(x, shape, x.scalar_type(), last);
  const Tensor offsets = pooled(x, shape, offsets_dtype(q), last);
  with_scalar(x.scalar_type(), "x", [&](auto scalar) {
    using T = decltype(scalar);
    if (y.numel() == 0) return;
    with_offset(q, [&](auto offset) {
      using O = decltype(offset);
      max_pool_kernel<T, O><<<flat_blocks(y.numel()), 256, 0, current_stream(x)>>>(
          q, input<T>(x), placement(x, dims, last), output<T>(y), output<O>(offsets),
          placement(y, dims, last), y.numel());
    });
    check_launch("max_pool");
  });
  return {y, offsets};
}

static Tensor max_pool_backward_cuda(const Tensor& g, const Tensor& offsets, Sizes shape,
                                     Sizes kernel, Sizes stride, Sizes padding, Sizes dilation) {
  const Pool q = check_max_pool_backward(g, offsets, shape, kernel, stride, padding, dilation);
  const int64_t dims = int64_t(kernel.size());
  const bool last = channels_last(offsets, dims);
  const torch::stable::accelerator::DeviceGuard guard(g.get_device_index());
  const Tensor grad = pooled(g, shape, g.scalar_type(), last);
  with_scalar(g.scalar_type(), "grad_output", [&](auto scalar) {
    using T = decltype(scalar);
    if (grad.numel() == 0) return;
    with_offset(q, [&](auto offset) {
      using O = decltype(offset);
      max_pool_backward_kernel<T, O><<<flat_blocks(grad.numel()), 256, 0, current_stream(g)>>>(
          q, input<T>(g), placement(g, dims, last), input<O>(offsets),
          placement(offsets, dims, last), output<T>(grad), placement(grad, dims, last),
          grad.numel());
    });
    check_launch("max_pool_backward");
  });
  return grad;
}

}  // namespace torchbp

STABLE_TORCH_LIBRARY_IMPL(torchbp, CUDA, m) {
  m.impl("max_pool", TORCH_BOX(&torchbp::max_pool_cuda));
  m.impl("max_pool_backward", TORCH_BOX(&torchbp::max_pool_backward_cuda));
}
