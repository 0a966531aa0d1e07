#include <torch/csrc/stable/library.h>

#include <type_traits>

#include "cuda/elementwise.cuh"
#include "cuda/launch.h"
#include "torchbp/elementwise_check.h"

namespace torchbp {

// Calls f with std::integral_constant<Fn, function>.
template <int i = 0, class F>
static void with_fn(int64_t function, F&& f) {
  if constexpr (i < fn_count) {
    if (function == i) return f(std::integral_constant<Fn, Fn(i)>{});
    with_fn<i + 1>(function, f);
  }
}

static Tensor elementwise_backward_cuda(const Tensor& grad_, const Tensor& kept_, int64_t function,
                                        double a, double b) {
  check_elementwise(grad_, kept_, function);
  const torch::stable::accelerator::DeviceGuard guard(kept_.get_device_index());
  const Tensor result = torch::stable::empty_like(kept_);
  const Tensor kept = with_strides_of(kept_, result), grad = with_strides_of(grad_, result);
  with_scalar(kept.scalar_type(), "kept", [&](auto scalar) {
    using T = decltype(scalar);
    const int64_t count = kept.numel();
    if (count == 0) return;
    with_fn(function, [&](auto fn) {
      tangent_kernel<decltype(fn)::value, T><<<flat_blocks(count), 256, 0, current_stream(kept)>>>(
          input<T>(grad), input<T>(kept), output<T>(result), count, acc_t<T>(a), acc_t<T>(b));
    });
    check_launch("elementwise_backward");
  });
  return result;
}

}  // namespace torchbp

STABLE_TORCH_LIBRARY_IMPL(torchbp, CUDA, m) {
  m.impl("elementwise_backward", TORCH_BOX(&torchbp::elementwise_backward_cuda));
}
