#include <torch/csrc/stable/library.h>

#include <tuple>
#include <type_traits>

#include "cuda/bias_act.cuh"
#include "cuda/launch.h"
#include "torchbp/bias_act_check.h"

namespace torchbp {

using Bias = std::optional<Tensor>;

// Calls f with std::integral_constant<Act, act>.
template <int i = 0, class F>
static void with_act(Act act, F&& f) {
  if constexpr (i < act_count) {
    if (int(act) == i) return f(std::integral_constant<Act, Act(i)>{});
    with_act<i + 1>(act, f);
  }
}

static Tensor bias_act_cuda(const Tensor& x_, const Bias& bias_, std::string act_name,
                            double alpha) {
  const Act act = parse_act(act_name);
  check_bias(x_, bias_);
  const torch::stable::accelerator::DeviceGuard guard(x_.get_device_index());
  const Tensor like = bias_ ? torch::stable::contiguous(x_) : x_;
  const Tensor y = torch::stable::empty_like(like), x = with_strides_of(like, y);
  const Bias bias = bias_ ? Bias(torch::stable::contiguous(*bias_)) : Bias();
  const int64_t count = x.numel(), channels = bias ? bias->size(0) : 1;
  with_scalar(x.scalar_type(), "x", [&](auto scalar) {
    using T = decltype(scalar);
    if (count == 0) return;
    with_act(act, [&](auto a) {
      forward_kernel<decltype(a)::value, T><<<flat_blocks(count), 256, 0, current_stream(x)>>>(
          input<T>(x), bias ? input<T>(*bias) : nullptr, output<T>(y), count, channels,
          acc_t<T>(alpha));
    });
    check_launch("bias_act");
  });
  return y;
}

template <class T>
static void backward_with_bias(const Tensor& g, const Tensor& x, const Tensor& bias, Act act,
                               acc_t<T> alpha, const Tensor& grad_input, const Tensor& grad_bias) {
  const int64_t channels = bias.size(0), rows = x.numel() / channels;
  const RowBlocks part(rows, x.numel());
  const auto dtype = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;
  const Tensor sums = torch::stable::new_empty(x, {part.blocks, channels}, dtype);
  const dim3 grid(unsigned(ceil_div(channels, lanes_x)), unsigned(part.blocks));
  const cudaStream_t stream = current_stream(x);
  with_act(act, [&](auto a) {
    backward_bias_kernel<decltype(a)::value, T><<<grid, dim3(lanes_x, lanes_y), 0, stream>>>(
        input<T>(g), input<T>(x), input<T>(bias), output<T>(grad_input), rows, channels, part.rows,
        alpha, output<acc_t<T>>(sums));
  });
  join_kernel<T><<<flat_blocks(channels), 256, 0, stream>>>(
      input<acc_t<T>>(sums), output<T>(grad_bias), part.blocks, channels);
}

static std::tuple<Tensor, Tensor> bias_act_backward_cuda(const Tensor& grad_, const Tensor& x_,
                                                         const Bias& bias, std::string act_name,
                                                         double alpha) {
  const Act act = parse_act(act_name);
  check_bias(x_, bias);
  check_same_shape(grad_, "grad_output", x_, "x");
  check_alike(grad_, "grad_output", x_, "x");
  const torch::stable::accelerator::DeviceGuard guard(x_.get_device_index());
  const Tensor like = bias ? torch::stable::contiguous(x_) : x_;
  const Tensor grad_input = torch::stable::empty_like(like);
  const Tensor x = with_strides_of(like, grad_input), g = with_strides_of(grad_, grad_input);
  const Tensor grad_bias = torch::stable::new_zeros(x, {bias ? bias->size(0) : 0});
  with_scalar(x.scalar_type(), "x", [&](auto scalar) {
    using T = decltype(scalar);
    if (x.numel() == 0) return;
    if (bias) {
      backward_with_bias<T>(g, x, torch::stable::contiguous(*bias), act, acc_t<T>(alpha),
                            grad_input, grad_bias);
    } else {
      with_act(act, [&](auto a) {
        backward_kernel<decltype(a)::value, T>
            <<<flat_blocks(x.numel()), 256, 0, current_stream(x)>>>(
                input<T>(g), input<T>(x), output<T>(grad_input), x.numel(), acc_t<T>(alpha));
      });
    }
    check_launch("bias_act_backward");
  });
  return {grad_input, grad_bias};
}

}  // namespace torchbp

STABLE_TORCH_LIBRARY_IMPL(torchbp, CUDA, m) {
  m.impl("bias_act", TORCH_BOX(&torchbp::bias_act_cuda));
  m.impl("bias_act_backward", TORCH_BOX(&torchbp::bias_act_backward_cuda));
}
