#include "torchbp/blame_settle.h"

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "cpu/isa.h"
#include "torchbp/blame_settle_check.h"

namespace torchbp {

static constexpr int64_t settle_tile = 512;

// What the tiles of all layers share; `units` are those of all layers.
template <class T>
struct Settle {
  const int64_t* labels;
  T *rows, *per_class;
  T inverse_scale;
  int64_t samples, units, n_classes;
};
// Some columns of one layer, with all samples: no two tiles add to the same sum.
template <class T>
struct SettleTile {
  const T *contribution, *stats;  // of the first column
  const Sample<T>* shared;
  int64_t layer, layer_units, first, width;
  T* per_sample;
};

}  // namespace torchbp

#define TORCHBP_LOOPS "cpu/blame_settle_loops.inc"
#include "cpu/each_isa.inc"

namespace torchbp {

template <class T>
static std::vector<SettleTile<T>> tiles_of(const std::vector<SettleLayer>& layers, int64_t units,
                                           const std::vector<Sample<T>>* shared) {
  const int64_t sixteenth = ceil_div(ceil_div(units, 16), 64) * 64;
  const int64_t width = std::clamp<int64_t>(sixteenth, 128, settle_tile);
  std::vector<SettleTile<T>> tiles;
  for (size_t i = 0; i < layers.size(); ++i) {
    const SettleLayer& l = layers[i];
    for (int64_t u = 0; u < l.units; u += width)
      tiles.push_back({input<T>(l.contribution) + u, input<T>(l.stats) + u,
                       shared[int(l.kind)].data(), int64_t(i), l.units, l.first + u,
                       std::min(width, l.units - u), nullptr});
  }
  return tiles;
}

template <class T>
static void run(const Settle<T>& q, const std::vector<SettleLayer>& layers, const T* losses,
                T* per_sample) {
  std::vector<Sample<T>> shared[3];
  for (const SettleLayer& l : layers) {
    std::vector<Sample<T>>& of_kind = shared[int(l.kind)];
    if (!of_kind.empty()) continue;
    of_kind.reserve(q.samples);
    for (int64_t n = 0; n < q.samples; ++n) of_kind.push_back(sample_of(l.kind, losses[n]));
  }
  std::vector<SettleTile<T>> tiles = tiles_of<T>(layers, q.units, shared);
  std::vector<T> sums(tiles.size() * q.samples);
  for (size_t i = 0; i < tiles.size(); ++i) tiles[i].per_sample = sums.data() + i * q.samples;
  const auto columns = TORCHBP_PICK(settle_columns<T>);
  const int64_t count = int64_t(tiles.size());
  const int64_t elements = std::max<int64_t>(1, q.units * q.samples);
  const int64_t grain = ceil_div(16384 * count, elements);
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) columns(q, tiles[i]);
  });
  const int64_t layer_count = int64_t(layers.size());
  for (const SettleTile<T>& tile : tiles)
    for (int64_t n = 0; n < q.samples; ++n)
      per_sample[n * layer_count + tile.layer] += tile.per_sample[n];
}

static std::tuple<Tensor, Tensor, Tensor> blame_settle_cpu(Layers contributions, Layers stats,
                                                           const Tensor& losses_,
                                                           const Labels& labels_, int64_t n_classes,
                                                           double scale,
                                                           std::vector<int64_t> kinds) {
  const auto layers =
      check_blame_settle(contributions, stats, losses_, labels_, n_classes, scale, kinds);
  const Tensor losses = packed(losses_);
  Labels labels;
  if (labels_) labels.emplace(packed(*labels_));
  const auto results = settle_results(layers, labels, n_classes);
  const auto& [rows, per_class, per_sample] = results;
  if (rows.numel() == 0) return results;
  const auto settle = [&](auto scalar) {
    using T = decltype(scalar);
    const Settle<T> q{labels ? input<int64_t>(*labels) : nullptr,
                      output<T>(rows),
                      output<T>(per_class),
                      T(1 / scale),
                      losses.size(0),
                      rows.size(1),
                      n_classes};
    run(q, layers, input<T>(losses), output<T>(per_sample));
  };
  losses.scalar_type() == ScalarType::Double ? settle(double{}) : settle(float{});
  return results;
}

}  // namespace torchbp

STABLE_TORCH_LIBRARY_IMPL(torchbp, CPU, m) {
  m.impl("blame_settle", TORCH_BOX(&torchbp::blame_settle_cpu));
}
