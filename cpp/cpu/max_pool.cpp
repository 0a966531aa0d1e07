#include "torchbp/max_pool.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "torchbp/max_pool_check.h"

namespace torchbp {

static std::tuple<Tensor, Tensor> max_pool_cpu(const Tensor& x_, const Sizes& kernel,
                                               const Sizes& stride, const Sizes& padding,
                                               const Sizes& dilation, bool ceil_mode) {
  const Pool q = check_max_pool(x_, kernel, stride, padding, dilation, ceil_mode);
  const int64_t dims = int64_t(kernel.size());
  const bool last = channels_last(x_, dims);
  const Tensor x = readable(x_, last);
  const Sizes shape = pooled_shape(x, q, dims);
  const Tensor y = pooled(x, shape, x.scalar_type(), last);
  const Tensor offsets = pooled(x, shape, offsets_dtype(q), last);
  with_scalar(x.scalar_type(), "x", [&](auto scalar) {
    using T = decltype(scalar);
    if (y.numel() == 0) return;
    with_offset(q, [&](auto offset) {
      using O = decltype(offset);
      if (last)
        channels_forward(q, input<T>(x), steps(x, dims), output<T>(y), output<O>(offsets),
                         steps(y, dims));
      else
        planes_forward(q, input<T>(x), output<T>(y), output<O>(offsets));
    });
  });
  return {y, offsets};
}

static Tensor max_pool_backward_cpu(const Tensor& grad_, const Tensor& offsets_, const Sizes& shape,
                                    const Sizes& kernel, const Sizes& stride, const Sizes& padding,
                                    const Sizes& dilation) {
  const Pool q = check_max_pool_backward(grad_, offsets_, shape, kernel, stride, padding, dilation);
  const int64_t dims = int64_t(kernel.size());
  const bool last = channels_last(offsets_, dims);
  const Tensor g = readable(grad_, last), offsets = readable(offsets_, last);
  const Tensor grad = pooled(g, shape, g.scalar_type(), last);
  with_scalar(g.scalar_type(), "grad_output", [&](auto scalar) {
    using T = decltype(scalar);
    if (grad.numel() == 0) return;
    with_offset(q, [&](auto offset) {
      using O = decltype(offset);
      if (last)
        channels_backward(q, input<T>(g), steps(g, dims), input<O>(offsets), steps(offsets, dims),
                          output<T>(grad), steps(grad, dims));
      else
        planes_backward(q, input<T>(g), input<O>(offsets), output<T>(grad));
    });
  });
  return grad;
}

}  // namespace torchbp

// torchbp/kernels/max_pool.py repeats these for the case that there is no extension.
STABLE_TORCH_LIBRARY_FRAGMENT(torchbp, m) {
  m.def(
      "max_pool(Tensor x, int[] kernel, int[] stride, int[] padding, int[] dilation,"
      " bool ceil_mode) -> (Tensor, Tensor)");
  m.def(
      "max_pool_backward(Tensor grad_output, Tensor offsets, int[] shape, int[] kernel,"
      " int[] stride, int[] padding, int[] dilation) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(torchbp, CPU, m) {
  m.impl("max_pool", TORCH_BOX(&torchbp::max_pool_cpu));
  m.impl("max_pool_backward", TORCH_BOX(&torchbp::max_pool_backward_cpu));
}
