// Arguments of blame_settle, checked the same way on every device.
#pragma once
#include <optional>
#include <tuple>
#include <vector>

#include "torchbp/blame_settle.h"
#include "torchbp/tensor.h"

namespace torchbp {

using Labels = std::optional<Tensor>;
using Layers = std::vector<Tensor>;

// One layer's columns in the results, and how its blame follows from contributions.
struct SettleLayer {
  Tensor contribution, stats;
  BlameKind kind;
  int64_t units, first;
};

inline void check_layer(const Tensor& c, const Tensor& stats, const Tensor& first) {
  const ScalarType dtype = c.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double,
                  "contributions: expected float32 or float64, got ",
                  torch::headeronly::toString(dtype));
  STD_TORCH_CHECK(c.dim() == 2, "contributions: expected samples x units, got ", c.dim(), " dims");
  check_alike(c, "contributions", first, "the first of them");
  STD_TORCH_CHECK(c.size(0) == first.size(0), "contributions: expected ", first.size(0),
                  " samples, as the first has, got ", c.size(0));
  STD_TORCH_CHECK(stats.dim() == 2 && stats.size(0) == 3 && stats.size(1) == c.size(1),
                  "stats: expected 3 x ", c.size(1), ", got ", stats.numel(), " in ", stats.dim(),
                  " dims");
  check_alike(stats, "stats", first, "the contributions");
}

inline std::vector<SettleLayer> check_blame_settle(const Layers& contributions, const Layers& stats,
                                                   const Tensor& losses, const Labels& labels,
                                                   int64_t n_classes, double scale,
                                                   const std::vector<int64_t>& kinds) {
  STD_TORCH_CHECK(!contributions.empty(), "contributions: expected at least one layer, got none");
  STD_TORCH_CHECK(stats.size() == contributions.size(), "stats: expected one for each of ",
                  contributions.size(), " layers, got ", stats.size());
  STD_TORCH_CHECK(kinds.size() == contributions.size(), "kinds: expected one for each of ",
                  contributions.size(), " layers, got ", kinds.size());
  std::vector<SettleLayer> layers;
  int64_t column = 0;
  for (size_t i = 0; i < contributions.size(); ++i) {
    const Tensor& c = contributions[i];
    check_layer(c, stats[i], contributions[0]);
    STD_TORCH_CHECK(0 <= kinds[i] && kinds[i] <= 2,
                    "kinds: expected 0 (taylor), 1 (log_odds) or 2 (squared), got ", kinds[i]);
    layers.push_back({packed(c), packed(stats[i]), BlameKind(kinds[i]), c.size(1), column});
    column += c.size(1);
  }
  const Tensor& first = contributions[0];
  const int64_t samples = first.size(0);
  STD_TORCH_CHECK(losses.dim() == 1 && losses.size(0) == samples,
                  "losses: expected one for each of ", samples, " samples, got ", losses.numel(),
                  " in ", losses.dim(), " dims");
  check_alike(losses, "losses", first, "the contributions");
  if (labels) {
    STD_TORCH_CHECK(labels->dim() == 1 && labels->size(0) == samples,
                    "labels: expected one for each of ", samples, " samples, got ", labels->numel(),
                    " in ", labels->dim(), " dims");
    STD_TORCH_CHECK(labels->scalar_type() == ScalarType::Long, "labels: expected int64, got ",
                    torch::headeronly::toString(labels->scalar_type()));
    STD_TORCH_CHECK(labels->device() == first.device(),
                    "labels: expected the device of the contributions");
  }
  STD_TORCH_CHECK(n_classes >= 0, "n_classes: expected 0 or more, got ", n_classes);
  STD_TORCH_CHECK(scale != 0, "scale: expected a number other than 0");
  return layers;
}

// rows, per_class and per_sample, all zero.
inline std::tuple<Tensor, Tensor, Tensor> settle_results(const std::vector<SettleLayer>& layers,
                                                         const Labels& labels, int64_t n_classes) {
  const Tensor& like = layers[0].contribution;
  const int64_t units = layers.back().first + layers.back().units;
  return {torch::stable::new_zeros(like, {6, units}),
          torch::stable::new_zeros(like, {labels ? n_classes : 0, units}),
          torch::stable::new_zeros(like, {like.size(0), int64_t(layers.size())})};
}

}  // namespace torchbp
