#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "cuda/blame_settle.cuh"
#include "cuda/launch.h"
#include "torchbp/blame_settle_check.h"

namespace torchbp {

// What all units of one sample share, by the kind of blame; made when first asked for.
template <class T>
class Samples {
 public:
  explicit Samples(const Tensor& losses) : losses_(losses) {}

  const Sample<T>* of(BlameKind kind) {
    std::optional<Tensor>& shared = shared_[int(kind)];
    if (!shared) {
      const int64_t samples = losses_.size(0), values = sizeof(Sample<T>) / sizeof(T);
      shared.emplace(torch::stable::new_empty(losses_, {samples, values}));
      if (samples > 0)
        sample_kernel<T><<<flat_blocks(samples), 256, 0, current_stream(losses_)>>>(
            input<T>(losses_), output<Sample<T>>(*shared), samples, kind);
    }
    return input<Sample<T>>(*shared);
  }

 private:
  const Tensor& losses_;
  std::optional<Tensor> shared_[3];
};

// One layer: its columns of rows and per_class, and its column of per_sample.
template <class T>
static void launch(const SettleArguments<T>& q, int64_t layer, cudaStream_t stream) {
  const dim3 block(lanes_x, lanes_y), columns(unsigned(ceil_div(q.units, lanes_x)));
  columns_kernel<T><<<columns, block, 0, stream>>>(q);
  if (q.samples == 0) return;
  const LayerGroup group{layer, {0, q.units}};
  layers_kernel<T><<<unsigned(ceil_div(q.samples, lanes_y)), block, 0, stream>>>(q, group);
}

static std::tuple<Tensor, Tensor, Tensor> blame_settle_cuda(Layers contributions, Layers stats,
                                                            const Tensor& losses_,
                                                            const Labels& labels_,
                                                            int64_t n_classes, double scale,
                                                            std::vector<int64_t> kinds) {
  const auto layers =
      check_blame_settle(contributions, stats, losses_, labels_, n_classes, scale, kinds);
  const torch::stable::accelerator::DeviceGuard guard(losses_.get_device_index());
  const Tensor losses = packed(losses_);
  Labels labels;
  if (labels_) labels.emplace(packed(*labels_));
  const auto results = settle_results(layers, labels, n_classes);
  const auto& [rows, per_class, per_sample] = results;
  if (rows.numel() == 0) return results;
  const auto settle = [&](auto scalar) {
    using T = decltype(scalar);
    Samples<T> shared(losses);
    for (size_t i = 0; i < layers.size(); ++i) {
      const SettleLayer& l = layers[i];
      if (l.units == 0) continue;
      const SettleArguments<T> q{input<T>(l.contribution),
                                 shared.of(l.kind),
                                 labels ? input<int64_t>(*labels) : nullptr,
                                 output<T>(rows) + l.first,
                                 output<T>(per_class) + l.first,
                                 output<T>(per_sample),
                                 T(1 / scale),
                                 losses.size(0),
                                 l.units,
                                 n_classes,
                                 int64_t(layers.size()),
                                 rows.size(1),
                                 input<T>(l.stats)};
      launch(q, int64_t(i), current_stream(losses));
    }
  };
  losses.scalar_type() == ScalarType::Double ? settle(double{}) : settle(float{});
  check_launch("blame_settle");
  return results;
}

}  // namespace torchbp

STABLE_TORCH_LIBRARY_IMPL(torchbp, CUDA, m) {
  m.impl("blame_settle", TORCH_BOX(&torchbp::blame_settle_cuda));
}
