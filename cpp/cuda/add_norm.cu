#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cuda/add_norm.cuh"
#include "cuda/bias_act.cuh"
#include "cuda/launch.h"
#include "torchbp/add_norm_check.h"

namespace torchbp {

// A pointer to a parameter's values: of the dtype of x, or of that of sums; null for the other.
template <class T>
static const T* values(const Optional& t, const Tensor& of_dtype) {
  return t && t->scalar_type() == of_dtype.scalar_type() ? input<T>(*t) : nullptr;
}

static unsigned row_blocks(int64_t rows) { return unsigned(std::min<int64_t>(rows, 1 << 16)); }

static std::tuple<Tensor, Tensor, Tensor, Tensor> add_norm_cuda(
    const Tensor& x_, const Optional& residual_, const Optional& mask_, double p,
    const Optional& weight_, const Optional& bias_, int64_t dims, bool centre, double eps) {
  const RowShape shape = check_add_norm(x_, residual_, mask_, weight_, bias_, dims);
  const torch::stable::accelerator::DeviceGuard guard(x_.get_device_index());
  const Tensor x = packed(x_), y = torch::stable::empty_like(x);
  const Optional residual = packed_if(residual_), mask = packed_if(mask_);
  const Optional weight = packed_if(weight_), bias = packed_if(bias_);
  const Tensor sum = residual ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  const Tensor rstd = torch::stable::new_empty(x, shape.statistics(), sum_dtype(x));
  const Tensor mean =
      centre ? torch::stable::empty_like(rstd) : torch::stable::new_empty(rstd, {0});
  with_scalar(x.scalar_type(), "x", [&](auto scalar) {
    using T = decltype(scalar);
    using A = acc_t<T>;
    if (shape.rows == 0) return;
    const AddNormArguments<T> q{input<T>(x),
                                residual ? input<T>(*residual) : nullptr,
                                mask ? input<uint8_t>(*mask) : nullptr,
                                values<T>(weight, x),
                                values<T>(bias, x),
                                values<A>(weight, rstd),
                                values<A>(bias, rstd),
                                output<T>(y),
                                residual ? output<T>(sum) : nullptr,
                                centre ? output<A>(mean) : nullptr,
                                output<A>(rstd),
                                dropout_noise<T>(p),
                                eps,
                                shape.rows,
                                shape.columns};
    add_norm_kernel<T><<<row_blocks(shape.rows), softmax_lanes, 0, current_stream(x)>>>(q);
    check_launch("add_norm");
  });
  return {y, sum, mean, rstd};
}

// The gradients of the branch, of x (or the sum), weight and bias.
static std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad_, const Optional& grad_sum_, const Tensor& x_, const Optional& mean_,
    const Tensor& rstd_, const Optional& weight_, const Optional& mask_, double p,
    const RowShape& shape) {
  const torch::stable::accelerator::DeviceGuard guard(x_.get_device_index());
  const Tensor x = packed(x_), grad = packed(grad_), rstd = packed(rstd_);
  const Optional grad_sum = packed_if(grad_sum_), mean = packed_if(mean_);
  const Optional weight = packed_if(weight_), mask = packed_if(mask_);
  const Tensor grad_input = torch::stable::empty_like(x);
  const Tensor branch = mask ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  const Tensor grad_weight = torch::stable::new_zeros(x, shape.inner, sum_dtype(x));
  const Tensor grad_bias = torch::stable::new_zeros(x, shape.inner, sum_dtype(x));
  with_scalar(x.scalar_type(), "x", [&](auto scalar) {
    using T = decltype(scalar);
    using A = acc_t<T>;
    if (x.numel() == 0) return;
    const RowBlocks part(shape.rows, x.numel());
    const Tensor sums = torch::stable::new_empty(x, {part.blocks, 2, shape.columns}, sum_dtype(x));
    const Tensor joined = torch::stable::new_empty(x, {2, shape.columns}, sum_dtype(x));
    const cudaStream_t stream = current_stream(x);
    const NormBackwardArguments<T> q{input<T>(grad),
                                     grad_sum ? input<T>(*grad_sum) : nullptr,
                                     input<T>(x),
                                     mask ? input<uint8_t>(*mask) : nullptr,
                                     mean ? input<A>(*mean) : nullptr,
                                     input<A>(rstd),
                                     values<T>(weight, x),
                                     values<A>(weight, rstd),
                                     output<T>(grad_input),
                                     mask ? output<T>(branch) : nullptr,
                                     output<A>(sums),
                                     dropout_noise<T>(p),
                                     shape.rows,
                                     shape.columns,
                                     part.rows};
    norm_backward_kernel<T><<<unsigned(part.blocks), softmax_lanes, 0, stream>>>(q);
    const int64_t size = 2 * shape.columns;
    join_kernel<A><<<flat_blocks(size), 256, 0, stream>>>(input<A>(sums), output<A>(joined),
                                                          part.blocks, size);
    Tensor of_weight = grad_weight, of_bias = grad_bias;
    torch::stable::copy_(of_weight,
                         torch::stable::view(torch::stable::select(joined, 0, 0), shape.inner));
    torch::stable::copy_(of_bias,
                         torch::stable::view(torch::stable::select(joined, 0, 1), shape.inner));
    check_launch("layer_norm_backward");
  });
  return {branch, grad_input, grad_weight, grad_bias};
}

static std::tuple<Tensor, Tensor, Tensor> layer_norm_backward_cuda(
    const Tensor& grad, const Tensor& x, const Optional& mean, const Tensor& rstd,
    const Optional& weight, int64_t dims) {
  const RowShape shape = check_layer_norm(grad, x, mean, rstd, weight, dims);
  auto [branch, of_x, of_weight, of_bias] =
      backward(grad, Optional(), x, mean, rstd, weight, Optional(), 0, shape);
  return {of_x, of_weight, of_bias};
}

static std::tuple<Tensor, Tensor, Tensor, Tensor> add_norm_backward_cuda(
    const Tensor& grad, const Optional& grad_sum, const Tensor& sum, const Optional& mean,
    const Tensor& rstd, const Optional& weight, const Optional& mask, double p, int64_t dims) {
  const RowShape shape =
      check_add_norm_backward(grad, grad_sum, sum, mean, rstd, weight, mask, dims);
  return backward(grad, grad_sum, sum, mean, rstd, weight, mask, p, shape);
}

}  // namespace torchbp

STABLE_TORCH_LIBRARY_IMPL(torchbp, CUDA, m) {
  m.impl("add_norm", TORCH_BOX(&torchbp::add_norm_cuda));
  m.impl("add_norm_backward", TORCH_BOX(&torchbp::add_norm_backward_cuda));
  m.impl("layer_norm_backward", TORCH_BOX(&torchbp::layer_norm_backward_cuda));
}
