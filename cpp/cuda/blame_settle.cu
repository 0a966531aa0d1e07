#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cuda/blame_settle.cuh"
#include "cuda/launch.h"
#include "torchbp/blame_settle_check.h"

namespace torchbp {

template <class T>
static void launch(SettleArguments<T> q, const Tensor& losses, BlameKind kind, const Sizes& sizes) {
  const cudaStream_t stream = current_stream(losses);
  const int64_t samples = q.samples, values = sizeof(Sample<T>) / sizeof(T);
  const Tensor shared = torch::stable::new_empty(losses, {samples, values});
  auto* const each = output<Sample<T>>(shared);
  sample_kernel<T><<<flat_blocks(samples), 256, 0, stream>>>(input<T>(losses), each, samples, kind);
  q.shared = each;
  const dim3 block(lanes_x, lanes_y), columns(unsigned(ceil_div(q.units, lanes_x)));
  columns_kernel<T><<<columns, block, 0, stream>>>(q);
  each_layer_group(sizes.data(), q.layers, [&](const LayerGroup& group, unsigned count) {
    const dim3 grid(unsigned(ceil_div(samples, lanes_y)), count);
    layers_kernel<T><<<grid, block, 0, stream>>>(q, group);
  });
  check_launch("blame_settle");
}

static std::tuple<Tensor, Tensor, Tensor> blame_settle_cuda(const Tensor& contribution_,
                                                            const Tensor& losses_,
                                                            const Labels& labels_,
                                                            int64_t n_classes, double scale,
                                                            int64_t kind, Sizes sizes) {
  check_blame_settle(contribution_, losses_, labels_, n_classes, scale, kind, sizes);
  const torch::stable::accelerator::DeviceGuard guard(contribution_.get_device_index());
  const Tensor contribution = packed(contribution_), losses = packed(losses_);
  Labels labels;
  if (labels_) labels.emplace(packed(*labels_));
  const auto results = settle_results(contribution, labels, n_classes, sizes);
  const auto& [rows, per_class, per_sample] = results;
  if (contribution.numel() == 0) return results;
  const auto settle = [&](auto scalar) {
    using T = decltype(scalar);
    const SettleArguments<T> q{input<T>(contribution),
                               nullptr,
                               labels ? input<int64_t>(*labels) : nullptr,
                               output<T>(rows),
                               output<T>(per_class),
                               output<T>(per_sample),
                               T(1 / scale),
                               contribution.size(0),
                               contribution.size(1),
                               n_classes,
                               int64_t(sizes.size())};
    launch(q, losses, BlameKind(kind), sizes);
  };
  contribution.scalar_type() == ScalarType::Double ? settle(double{}) : settle(float{});
  return results;
}

}  // namespace torchbp

STABLE_TORCH_LIBRARY_IMPL(torchbp, CUDA, m) {
  m.impl("blame_settle", TORCH_BOX(&torchbp::blame_settle_cuda));
}
