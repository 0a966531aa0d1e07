// Arguments of blame_settle, checked the same way on every device.
#pragma once
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "torchbp/blame_settle.h"
#include "torchbp/tensor.h"

namespace torchbp {

using Labels = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;

inline void check_blame_settle(const Tensor& contribution, const Tensor& losses,
                               const Labels& labels, int64_t n_classes, double scale, int64_t kind,
                               const Sizes& sizes) {
  const ScalarType dtype = contribution.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double,
                  "contribution: expected float32 or float64, got ",
                  torch::headeronly::toString(dtype));
  STD_TORCH_CHECK(contribution.dim() == 2, "contribution: expected samples x units, got ",
                  contribution.dim(), " dims");
  const int64_t samples = contribution.size(0), units = contribution.size(1);
  STD_TORCH_CHECK(losses.dim() == 1 && losses.size(0) == samples,
                  "losses: expected one for each of ", samples, " samples, got ", losses.numel(),
                  " in ", losses.dim(), " dims");
  check_alike(losses, "losses", contribution, "contribution");
  if (labels) {
    STD_TORCH_CHECK(labels->dim() == 1 && labels->size(0) == samples,
                    "labels: expected one for each of ", samples, " samples, got ", labels->numel(),
                    " in ", labels->dim(), " dims");
    STD_TORCH_CHECK(labels->scalar_type() == ScalarType::Long, "labels: expected int64, got ",
                    torch::headeronly::toString(labels->scalar_type()));
    STD_TORCH_CHECK(labels->device() == contribution.device(),
                    "labels: expected the device of contribution");
  }
  STD_TORCH_CHECK(n_classes >= 0, "n_classes: expected 0 or more, got ", n_classes);
  STD_TORCH_CHECK(scale != 0, "scale: expected a number other than 0");
  STD_TORCH_CHECK(0 <= kind && kind <= 2,
                  "kind: expected 0 (taylor), 1 (log_odds) or 2 (squared), got ", kind);
  int64_t sum = 0;
  for (const int64_t size : sizes) {
    STD_TORCH_CHECK(size >= 0, "sizes: expected 0 or more columns in a layer, got ", size);
    sum += size;
  }
  STD_TORCH_CHECK(sizes.empty() || sum == units, "sizes: expected a sum of ", units,
                  ", the columns of contribution, got ", sum);
}

// rows, per_class and per_sample, all zero.
inline std::tuple<Tensor, Tensor, Tensor> settle_results(const Tensor& contribution,
                                                         const Labels& labels, int64_t n_classes,
                                                         const Sizes& sizes) {
  const int64_t samples = contribution.size(0), units = contribution.size(1);
  return {torch::stable::new_zeros(contribution, {3, units}),
          torch::stable::new_zeros(contribution, {labels ? n_classes : 0, units}),
          torch::stable::new_zeros(contribution, {samples, int64_t(sizes.size())})};
}

}  // namespace torchbp
