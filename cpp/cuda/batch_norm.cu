#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cuda/batch_norm.cuh"
#include "cuda/launch.h"
#include "torchbp/norm_check.h"

namespace torchbp {

static std::tuple<Tensor, Tensor, Tensor> batch_norm_backward_cuda(
    const Tensor& grad_, const Tensor& x_, const Tensor& mean_, const Tensor& rstd_,
    const Optional& weight_, bool training) {
  check_batch_norm(grad_, x_, mean_, rstd_, weight_, training);
  const torch::stable::accelerator::DeviceGuard guard(x_.get_device_index());
  const bool inner = channels_innermost(x_);
  const Tensor x = inner ? x_ : packed(x_), grad = with_strides_of(grad_, x);
  const Tensor mean = packed(mean_), rstd = packed(rstd_);
  const Optional weight = packed_if(weight_);
  const Tensor grad_input = torch::stable::empty_like(x);
  const int64_t channels = x.size(1);
  const Tensor grad_weight = torch::stable::new_zeros(x, {channels}, sum_dtype(x));
  const Tensor grad_bias = torch::stable::new_zeros(x, {channels}, sum_dtype(x));
  with_scalar(x.scalar_type(), "x", [&](auto scalar) {
    using T = decltype(scalar);
    using A = acc_t<T>;
    if (x.numel() == 0) return;
    const bool narrow = weight && weight->scalar_type() == x.scalar_type();
    BatchNormArguments<T> q{};
    q.grad_output = input<T>(grad);
    q.x = input<T>(x);
    q.mean = input<A>(mean);
    q.rstd = input<A>(rstd);
    q.weight = narrow ? input<T>(*weight) : nullptr;
    q.wide_weight = weight && !narrow ? input<A>(*weight) : nullptr;
    q.grad_input = output<T>(grad_input);
    q.grad_weight = output<A>(grad_weight);
    q.grad_bias = output<A>(grad_bias);
    q.samples = x.size(0);
    q.channels = channels;
    q.positions = x.numel() / (q.samples * channels);
    q.groups = mean.dim() == 2 ? mean.size(1) : 0;
    q.channels_inner = inner;
    q.training = training;
    if (inner && q.groups == 0) {  // the samples count as positions of a single one
      q.positions *= q.samples;
      q.samples = 1;
    }
    const RowBlocks part(q.positions, inner ? q.positions * channels : q.positions);
    q.blocks = part.blocks;
    q.block_rows = part.rows;
    const int64_t statistics = mean.numel();
    const auto fresh = [&](int64_t count) {
      return torch::stable::new_empty(x, {count}, sum_dtype(x));
    };
    const Tensor sums = fresh(q.samples * q.blocks * 2 * channels);
    const Tensor slope = fresh(statistics), shift = fresh(statistics);
    q.sums = output<A>(sums);
    q.slope = output<A>(slope);
    q.shift = output<A>(shift);
    const cudaStream_t stream = current_stream(x);
    const int64_t columns = inner ? ceil_div(channels, lanes_x) : channels;
    const dim3 grid(unsigned(columns), unsigned(std::min(q.samples * q.blocks, most_grid_y)));
    plane_sums_kernel<T><<<grid, dim3(lanes_x, lanes_y), 0, stream>>>(q);
    statistic_kernel<T><<<flat_blocks(statistics), 256, 0, stream>>>(q);
    parameter_kernel<T><<<flat_blocks(channels), 256, 0, stream>>>(q);
    channel_gradient_kernel<T><<<flat_blocks(x.numel()), 256, 0, stream>>>(q);
    check_launch("batch_norm_backward");
  });
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace torchbp

STABLE_TORCH_LIBRARY_IMPL(torchbp, CUDA, m) {
  m.impl("batch_norm_backward", TORCH_BOX(&torchbp::batch_norm_backward_cuda));
}
