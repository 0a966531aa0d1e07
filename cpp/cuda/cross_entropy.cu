#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cuda/cross_entropy.cuh"
#include "cuda/launch.h"
#include "torchbp/cross_entropy_check.h"

namespace torchbp {

static OptionalTensor contiguous(const OptionalTensor& t) {
  return t ? OptionalTensor(packed(*t)) : OptionalTensor();
}

struct LossOptions {
  Reduction reduction;
  int64_t ignore_index;
  double smoothing, z_loss;
};

// The sums of weights that every launch needs, two float64 numbers.
template <class T>
static Tensor weight_sums(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                          const LossOptions& o) {
  const Tensor sums = torch::stable::new_empty(logits, {2}, ScalarType::Double);
  loss_weights_kernel<T><<<1, loss_threads, 0, current_stream(logits)>>>(
      weight ? input<T>(*weight) : nullptr, input<int64_t>(target), logits.size(0), logits.size(1),
      o.ignore_index, output<double>(sums));
  return sums;
}

template <class T>
static void launch_rows(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                        const Tensor& sums, const LossOptions& o, const acc_t<T>* grad,
                        bool grad_by_row, T* to, acc_t<T>* both) {
  const int64_t rows = logits.size(0), classes = logits.size(1);
  if (rows == 0) return;
  const LossArguments<T> p{input<T>(logits),
                           weight ? input<T>(*weight) : nullptr,
                           input<int64_t>(target),
                           grad,
                           input<double>(sums),
                           to,
                           both,
                           rows,
                           {classes, o.ignore_index, o.smoothing, o.z_loss, 0},
                           grad_by_row,
                           o.reduction == Reduction::mean};
  loss_kernel<T>
      <<<unsigned(std::min<int64_t>(rows, 1 << 20)), loss_threads, 0, current_stream(logits)>>>(p);
  check_launch("cross_entropy");
}

static std::tuple<Tensor, Tensor> cross_entropy_cuda(const Tensor& logits_, const Tensor& target_,
                                                     const OptionalTensor& weight_,
                                                     int64_t reduction, int64_t ignore_index,
                                                     double smoothing, double z_loss) {
  check_cross_entropy(logits_, target_, weight_);
  const LossOptions o{check_reduction(reduction), ignore_index, smoothing, z_loss};
  const torch::stable::accelerator::DeviceGuard guard(logits_.get_device_index());
  const Tensor logits = packed(logits_), target = packed(target_);
  const OptionalTensor weight = contiguous(weight_);
  const int64_t rows = logits.size(0);
  const bool by_row = o.reduction == Reduction::none;
  const Tensor both = torch::stable::new_empty(logits, {2, rows}, loss_dtype(logits));
  const Tensor loss =
      by_row ? torch::stable::new_empty(logits, {rows}) : torch::stable::new_empty(logits, {});
  with_scalar(logits.scalar_type(), "logits", [&](auto scalar) {
    using T = decltype(scalar);
    using A = acc_t<T>;
    const cudaStream_t stream = current_stream(logits);
    const Tensor sums = weight_sums<T>(logits, target, weight, o);
    launch_rows<T>(logits, target, weight, sums, o, nullptr, false, nullptr, output<A>(both));
    if (!by_row)
      loss_sum_kernel<T><<<1, loss_threads, 0, stream>>>(input<A>(both), rows, input<double>(sums),
                                                         o.reduction == Reduction::mean,
                                                         output<T>(loss));
    else if (rows > 0)
      loss_cast_kernel<T><<<unsigned(ceil_div(rows, loss_threads)), loss_threads, 0, stream>>>(
          input<A>(both), rows, output<T>(loss));
    check_launch("cross_entropy");
  });
  return {loss, both};
}

static Tensor cross_entropy_backward_cuda(const Tensor& grad_, const Tensor& logits_,
                                          const Tensor& target_, const OptionalTensor& weight_,
                                          int64_t reduction, int64_t ignore_index, double smoothing,
                                          double z_loss) {
  check_cross_entropy(logits_, target_, weight_);
  const LossOptions o{check_reduction(reduction), ignore_index, smoothing, z_loss};
  check_loss_gradient(grad_, logits_, o.reduction);
  const torch::stable::accelerator::DeviceGuard guard(logits_.get_device_index());
  const Tensor grad = packed(grad_), logits = packed(logits_), target = packed(target_);
  const OptionalTensor weight = contiguous(weight_);
  const Tensor result = torch::stable::empty_like(logits);
  with_scalar(logits.scalar_type(), "logits", [&](auto scalar) {
    using T = decltype(scalar);
    const Tensor sums = weight_sums<T>(logits, target, weight, o);
    launch_rows<T>(logits, target, weight, sums, o, input<acc_t<T>>(grad),
                   o.reduction == Reduction::none, output<T>(result), nullptr);
  });
  return result;
}

static Tensor cross_entropy_in_place_cuda(const Tensor& logits, const Tensor& grad_,
                                          const Tensor& target_, const OptionalTensor& weight_,
                                          int64_t ignore_index, double smoothing, double z_loss) {
  check_cross_entropy(logits, target_, weight_);
  STD_TORCH_CHECK(logits.is_contiguous(), "logits: expected a contiguous tensor to write into");
  const bool by_row = grad_.dim() > 0;
  const LossOptions o{Reduction::sum, ignore_index, smoothing, z_loss};
  check_loss_gradient(grad_, logits, by_row ? Reduction::none : Reduction::sum);
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  const Tensor grad = packed(grad_), target = packed(target_);
  const OptionalTensor weight = contiguous(weight_);
  const Tensor both = torch::stable::new_empty(logits, {2, logits.size(0)}, loss_dtype(logits));
  with_scalar(logits.scalar_type(), "logits", [&](auto scalar) {
    using T = decltype(scalar);
    const Tensor sums = weight_sums<T>(logits, target, weight, o);
    launch_rows<T>(logits, target, weight, sums, o, input<acc_t<T>>(grad), by_row,
                   output<T>(logits), output<acc_t<T>>(both));
  });
  return both;
}

}  // namespace torchbp

STABLE_TORCH_LIBRARY_IMPL(torchbp, CUDA, m) {
  m.impl("cross_entropy", TORCH_BOX(&torchbp::cross_entropy_cuda));
  m.impl("cross_entropy_backward", TORCH_BOX(&torchbp::cross_entropy_backward_cuda));
  m.impl("cross_entropy_in_place", TORCH_BOX(&torchbp::cross_entropy_in_place_cuda));
}
