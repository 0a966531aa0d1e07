#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "cpu/isa.h"
#include "cpu/memory.h"
#include "torchbp/cross_entropy_check.h"

#define TORCHBP_LOOPS "cpu/cross_entropy_loops.inc"
#include "cpu/each_isa.inc"

namespace torchbp {

// The arguments of a call, contiguous and checked.
template <class T>
struct LossCall {
  using A = acc_t<T>;
  const int64_t rows;
  const int64_t* target;
  const T* weight;
  LossSettings<A> settings;
  double denominator = 1;  // of the mean: the weights of the classes that are there

  LossCall(const Tensor& logits, const Tensor& target_, const OptionalTensor& weight_,
           int64_t ignore_index, double smoothing, double z_loss, Reduction reduction)
      : rows(logits.size(0)),
        target(input<int64_t>(target_)),
        weight(weight_ ? input<T>(*weight_) : nullptr),
        settings{logits.size(1), ignore_index, smoothing, z_loss, double(logits.size(1))} {
    double present = 0;
    for (int64_t i = 0; i < rows; ++i) {
      if (target[i] == ignore_index) continue;
      STD_TORCH_CHECK(0 <= target[i] && target[i] < settings.classes,
                      "target: expected classes in [0, ", settings.classes, "), got ", target[i]);
      present += weight == nullptr ? 1. : double(up(weight[target[i]]));
    }
    if (reduction == Reduction::mean) denominator = present;
    if (weight == nullptr || smoothing == 0) return;
    settings.weight_sum = 0;
    for (int64_t k = 0; k < settings.classes; ++k) settings.weight_sum += double(up(weight[k]));
  }

  template <class F>
  void each_row(const F& f) const {
    torch::stable::parallel_for(0, rows, ceil_div(16384, settings.classes),
                                [&](int64_t begin, int64_t end) {
                                  for (int64_t i = begin; i < end; ++i) f(i);
                                });
  }

  // The losses and the log-odds of the rows, [2, rows].
  Tensor forward(const Tensor& logits) const {
    const Tensor both = fresh(logits, {2, rows}, loss_dtype(logits));
    const auto row = TORCHBP_PICK(loss_row<T>);
    const T* z = input<T>(logits);
    A* to = output<A>(both);
    each_row([&](int64_t i) {
      RowLoss<A> one;
      row(z + i * settings.classes, weight, target[i], 0, nullptr, &one, settings);
      to[i] = one.loss;
      to[rows + i] = one.log_odds;
    });
    return both;
  }

  // g: of every row, or one for all. Where `both` is given, it is written as by forward.
  void backward(const T* z, const A* g, bool by_row, T* to, A* both) const {
    const auto row = TORCHBP_PICK(loss_row<T>);
    each_row([&](int64_t i) {
      RowLoss<A> one;
      const int64_t at = i * settings.classes;
      row(z + at, weight, target[i], double(g[by_row ? i : 0]) / denominator, to + at,
          both == nullptr ? nullptr : &one, settings);
      if (both == nullptr) return;
      both[i] = one.loss;
      both[rows + i] = one.log_odds;
    });
  }

  template <class To>
  To reduced(const A* losses) const {
    double sum = 0;
    for (int64_t i = 0; i < rows; ++i) sum += double(losses[i]);
    return down<To>(acc_t<To>(sum / denominator));
  }
};

static OptionalTensor packed(const OptionalTensor& t) {
  return t ? OptionalTensor(packed(*t)) : OptionalTensor();
}

static std::tuple<Tensor, Tensor> cross_entropy_cpu(const Tensor& logits_, const Tensor& target_,
                                                    const OptionalTensor& weight_,
                                                    int64_t reduction_, int64_t ignore_index,
                                                    double smoothing, double z_loss) {
  check_cross_entropy(logits_, target_, weight_);
  const Reduction reduction = check_reduction(reduction_);
  const Tensor logits = packed(logits_), target = packed(target_);
  const OptionalTensor weight = packed(weight_);
  Tensor loss, both;
  with_scalar(logits.scalar_type(), "logits", [&](auto scalar) {
    using T = decltype(scalar);
    using A = acc_t<T>;
    const LossCall<T> call(logits, target, weight, ignore_index, smoothing, z_loss, reduction);
    both = call.forward(logits);
    const A* losses = input<A>(both);
    if (reduction == Reduction::none) {
      loss = fresh(logits, {call.rows});
      std::transform(losses, losses + call.rows, output<T>(loss), down<T>);
    } else {
      loss = fresh(logits, {});
      *output<T>(loss) = call.template reduced<T>(losses);
    }
  });
  return {loss, both};
}

static Tensor cross_entropy_backward_cpu(const Tensor& grad_, const Tensor& logits_,
                                         const Tensor& target_, const OptionalTensor& weight_,
                                         int64_t reduction_, int64_t ignore_index, double smoothing,
                                         double z_loss) {
  check_cross_entropy(logits_, target_, weight_);
  const Reduction reduction = check_reduction(reduction_);
  check_loss_gradient(grad_, logits_, reduction);
  const Tensor grad = packed(grad_), logits = packed(logits_), target = packed(target_);
  const OptionalTensor weight = packed(weight_);
  const Tensor result = in_huge_pages(fresh_like(logits));
  with_scalar(logits.scalar_type(), "logits", [&](auto scalar) {
    using T = decltype(scalar);
    const LossCall<T> call(logits, target, weight, ignore_index, smoothing, z_loss, reduction);
    call.backward(input<T>(logits), input<acc_t<T>>(grad), reduction == Reduction::none,
                  output<T>(result), nullptr);
  });
  return result;
}

static Tensor cross_entropy_in_place_cpu(const Tensor& logits, const Tensor& grad,
                                         const Tensor& target_, const OptionalTensor& weight_,
                                         int64_t ignore_index, double smoothing, double z_loss) {
  check_cross_entropy(logits, target_, weight_);
  STD_TORCH_CHECK(logits.is_contiguous(), "logits: expected a contiguous tensor to write into");
  check_loss_gradient(grad, logits, grad.dim() == 0 ? Reduction::sum : Reduction::none);
  const Tensor g = packed(grad), target = packed(target_);
  const OptionalTensor weight = packed(weight_);
  const Tensor both = fresh(logits, {2, logits.size(0)}, loss_dtype(logits));
  with_scalar(logits.scalar_type(), "logits", [&](auto scalar) {
    using T = decltype(scalar);
    using A = acc_t<T>;
    const LossCall<T> call(logits, target, weight, ignore_index, smoothing, z_loss, Reduction::sum);
    call.backward(input<T>(logits), input<A>(g), grad.dim() > 0, output<T>(logits),
                  output<A>(both));
  });
  return both;
}

}  // namespace torchbp

STABLE_TORCH_LIBRARY_FRAGMENT(torchbp, m) {
  m.def(
      "cross_entropy(Tensor logits, Tensor target, Tensor? weight, int reduction, int ignore_index,"
      " float smoothing, float z_loss) -> (Tensor, Tensor)");
  m.def(
      "cross_entropy_backward(Tensor grad_output, Tensor logits, Tensor target, Tensor? weight,"
      " int reduction, int ignore_index, float smoothing, float z_loss) -> Tensor");
  m.def(
      "cross_entropy_in_place(Tensor(a!) logits, Tensor grad_output, Tensor target, Tensor? weight,"
      " int ignore_index, float smoothing, float z_loss) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(torchbp, CPU, m) {
  m.impl("cross_entropy", TORCH_BOX(&torchbp::cross_entropy_cpu));
  m.impl("cross_entropy_backward", TORCH_BOX(&torchbp::cross_entropy_backward_cpu));
  m.impl("cross_entropy_in_place", TORCH_BOX(&torchbp::cross_entropy_in_place_cpu));
}
