#include "torchbp/blame_settle.h"

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "cpu/isa.h"
#include "torchbp/blame_settle_check.h"

namespace torchbp {

static constexpr int64_t settle_tile = 512;

template <class T>
struct Settle {
  const T* contribution;
  const Sample<T>* shared;
  const int64_t* labels;
  T *rows, *per_class;
  T inverse_scale;
  int64_t samples, units, n_classes;
};
// The columns [begin, end) of one layer in one tile, and their sum for every sample.
template <class T>
struct Piece {
  int64_t layer, begin, end;
  T* sums;
};

}  // namespace torchbp

#define TORCHBP_LOOPS "cpu/blame_settle_loops.inc"
#include "cpu/each_isa.inc"

namespace torchbp {

// Tiles of columns, each with all samples: no sum is shared between tasks but those of layers that
// reach over several tiles. Their pieces are joined in order.
struct Tiles {
  int64_t units, width, count;
  explicit Tiles(int64_t units_) : units(units_) {
    width = std::clamp<int64_t>(ceil_div(ceil_div(units, 16), 64) * 64, 128, settle_tile);
    count = ceil_div(units, width);
  }
  int64_t begin(int64_t tile) const { return tile * width; }
  int64_t end(int64_t tile) const { return std::min(units, (tile + 1) * width); }
};

template <class T>
struct Pieces {
  std::vector<Piece<T>> all;
  std::vector<int64_t> first;  // of every tile, and the end of the last
  std::vector<T> sums;

  Pieces(const Tiles& tiles, const Sizes& sizes, int64_t samples) {
    int64_t layer = -1, end = 0;
    for (int64_t tile = 0; tile < tiles.count; ++tile) {
      first.push_back(int64_t(all.size()));
      for (int64_t u = tiles.begin(tile); u < tiles.end(tile) && !sizes.empty();) {
        while (end <= u) end += sizes[++layer];
        const int64_t stop = std::min(end, tiles.end(tile));
        all.push_back({layer, u, stop, nullptr});
        u = stop;
      }
    }
    first.push_back(int64_t(all.size()));
    sums.resize(all.size() * samples);
    for (size_t i = 0; i < all.size(); ++i) all[i].sums = sums.data() + i * samples;
  }
};

template <class T>
static void run(Settle<T> q, const T* losses, BlameKind kind, const Sizes& sizes, T* per_sample) {
  std::vector<Sample<T>> shared(q.samples);
  for (int64_t n = 0; n < q.samples; ++n) shared[n] = sample_of(kind, losses[n]);
  q.shared = shared.data();
  const Tiles tiles(q.units);
  const Pieces<T> pieces(tiles, sizes, q.samples);
  const auto columns = TORCHBP_PICK(settle_columns<T>);
  const int64_t grain = ceil_div(16384, tiles.width * q.samples);
  torch::stable::parallel_for(0, tiles.count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      columns(q, tiles.begin(i), tiles.end(i), pieces.all.data() + pieces.first[i],
              pieces.all.data() + pieces.first[i + 1]);
  });
  const int64_t layers = int64_t(sizes.size());
  for (const Piece<T>& p : pieces.all)
    for (int64_t n = 0; n < q.samples; ++n) per_sample[n * layers + p.layer] += p.sums[n];
}

static std::tuple<Tensor, Tensor, Tensor> blame_settle_cpu(const Tensor& contribution_,
                                                           const Tensor& losses_,
                                                           const Labels& labels_, int64_t n_classes,
                                                           double scale, int64_t kind,
                                                           Sizes sizes) {
  check_blame_settle(contribution_, losses_, labels_, n_classes, scale, kind, sizes);
  const Tensor contribution = packed(contribution_), losses = packed(losses_);
  Labels labels;
  if (labels_) labels.emplace(packed(*labels_));
  const auto results = settle_results(contribution, labels, n_classes, sizes);
  const auto& [rows, per_class, per_sample] = results;
  if (contribution.numel() == 0) return results;
  const auto settle = [&](auto scalar) {
    using T = decltype(scalar);
    const Settle<T> q{input<T>(contribution),
                      nullptr,
                      labels ? input<int64_t>(*labels) : nullptr,
                      output<T>(rows),
                      output<T>(per_class),
                      T(1 / scale),
                      contribution.size(0),
                      contribution.size(1),
                      n_classes};
    run(q, input<T>(losses), BlameKind(kind), sizes, output<T>(per_sample));
  };
  contribution.scalar_type() == ScalarType::Double ? settle(double{}) : settle(float{});
  return results;
}

}  // namespace torchbp

STABLE_TORCH_LIBRARY_IMPL(torchbp, CPU, m) {
  m.impl("blame_settle", TORCH_BOX(&torchbp::blame_settle_cpu));
}
