// Arguments of the cross-entropy kernels, checked the same way on every device.
#pragma once
#include <optional>

#include "torchbp/cross_entropy.h"
#include "torchbp/tensor.h"

namespace torchbp {

using OptionalTensor = std::optional<Tensor>;

inline void check_cross_entropy(const Tensor& logits, const Tensor& target,
                                const OptionalTensor& weight) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.size(1) > 0,
                  "logits: expected rows x classes with a class at least, got ", logits.dim(),
                  " dims and ", logits.numel(), " elements");
  STD_TORCH_CHECK(target.dim() == 1 && target.size(0) == logits.size(0),
                  "target: expected one class for each of the ", logits.size(0), " rows, got ",
                  target.numel(), " in ", target.dim(), " dims");
  STD_TORCH_CHECK(target.scalar_type() == ScalarType::Long, "target: expected int64, got ",
                  torch::headeronly::toString(target.scalar_type()));
  STD_TORCH_CHECK(target.device() == logits.device(), "target: expected the device of logits");
  if (!weight) return;
  STD_TORCH_CHECK(weight->dim() == 1 && weight->size(0) == logits.size(1),
                  "weight: expected one value for each of the ", logits.size(1), " classes, got ",
                  weight->numel(), " in ", weight->dim(), " dims");
  check_alike(*weight, "weight", logits, "logits");
}

inline Reduction check_reduction(int64_t reduction) {
  STD_TORCH_CHECK(0 <= reduction && reduction <= 2, "reduction: expected 0, 1 or 2, got ",
                  reduction);
  return Reduction(reduction);
}

inline ScalarType loss_dtype(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The gradient of the loss: a number, or one for every row; in the dtype that losses have.
inline void check_loss_gradient(const Tensor& g, const Tensor& logits, Reduction reduction) {
  const bool by_row = reduction == Reduction::none;
  STD_TORCH_CHECK(by_row ? g.dim() == 1 && g.size(0) == logits.size(0) : g.dim() == 0,
                  "grad_output: expected ", by_row ? "one value per row" : "a scalar", ", got ",
                  g.numel(), " in ", g.dim(), " dims");
  STD_TORCH_CHECK(g.scalar_type() == loss_dtype(logits), "grad_output: expected ",
                  torch::headeronly::toString(loss_dtype(logits)), ", got ",
                  torch::headeronly::toString(g.scalar_type()));
  STD_TORCH_CHECK(g.device() == logits.device(), "grad_output: expected the device of logits");
}

}  // namespace torchbp
