#include <torch/csrc/stable/library.h>

#include <tuple>
#include <type_traits>

#include "cuda/gated.cuh"
#include "cuda/launch.h"
#include "torchbp/gated_check.h"

namespace torchbp {

// Calls f with std::integral_constant<Act, act> for the activations that need no setting.
template <int i = 0, class F>
static void with_gate(Act act, F&& f) {
  if constexpr (i < act_count) {
    if constexpr (Act(i) != Act::leaky_relu)
      if (int(act) == i) return f(std::integral_constant<Act, Act(i)>{});
    with_gate<i + 1>(act, f);
  }
}

static Tensor gated_cuda(const Tensor& value, const std::optional<Tensor>& gate, std::string name) {
  const Act act = parse_gate(name);
  check_gated(value, gate);
  const torch::stable::accelerator::DeviceGuard guard(value.get_device_index());
  const Tensor y = gated_result(value, gate);
  with_scalar(value.scalar_type(), "value", [&](auto scalar) {
    using T = decltype(scalar);
    const int64_t count = y.numel();
    if (count == 0) return;
    const GatedRows q = gated_rows(value, gate, y);
    with_gate(act, [&](auto a) {
      gated_kernel<decltype(a)::value, T><<<flat_blocks(count), 256, 0, current_stream(value)>>>(
          input<T>(q.value), input<T>(q.gate) + q.gate_begin, output<T>(y), count, q.width,
          q.value_step, q.gate_step);
    });
    check_launch("gated");
  });
  return y;
}

static std::tuple<Tensor, Tensor> gated_backward_cuda(const Tensor& grad_, const Tensor& value,
                                                      const std::optional<Tensor>& gate,
                                                      std::string name) {
  const Act act = parse_gate(name);
  check_gated(value, gate);
  check_gated_gradient(grad_, value, gate);
  const torch::stable::accelerator::DeviceGuard guard(value.get_device_index());
  const Tensor like = gate ? value : packed(value);
  const Tensor of_value = torch::stable::empty_like(like);
  const Tensor of_gate =
      gate ? torch::stable::empty_like(like) : torch::stable::new_empty(value, {0});
  with_scalar(value.scalar_type(), "value", [&](auto scalar) {
    using T = decltype(scalar);
    const int64_t count = grad_.numel();
    if (count == 0) return;
    const Tensor grad = gate ? with_strides_of(grad_, of_value) : packed(grad_);
    const GatedRows q = gated_rows(value, gate, grad);
    T *to_a = output<T>(of_value), *to_b = gate ? output<T>(of_gate) : to_a + q.width;
    with_gate(act, [&](auto a) {
      gated_backward_kernel<decltype(a)::value, T>
          <<<flat_blocks(count), 256, 0, current_stream(value)>>>(
              input<T>(grad), input<T>(q.value), input<T>(q.gate) + q.gate_begin, to_a, to_b, count,
              q.width, q.value_step, q.gate_step, gate ? q.width : 2 * q.width);
    });
    check_launch("gated_backward");
  });
  return {of_value, of_gate};
}

}  // namespace torchbp

STABLE_TORCH_LIBRARY_IMPL(torchbp, CUDA, m) {
  m.impl("gated", TORCH_BOX(&torchbp::gated_cuda));
  m.impl("gated_backward", TORCH_BOX(&torchbp::gated_backward_cuda));
}
