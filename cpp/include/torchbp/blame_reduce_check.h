// Arguments of blame_reduce: checked, and seen as samples x positions x units, on every device.
#pragma once
#include <optional>

#include "torchbp/blame_reduce.h"
#include "torchbp/tensor.h"

namespace torchbp {

struct BlameLayout {
  Tensor activation, error;
  Strides activation_strides, error_strides;
  int64_t samples, positions, units;
  bool units_inner;  // the units are the innermost loop: their strides are 1

  int64_t count() const { return samples * positions * units; }
};

// The strides of t as (sample, position, unit), if all position dims step through memory as one.
inline std::optional<Strides> collapse(const Tensor& t, int64_t unit_dim) {
  int64_t positions = 1, step = 1;
  for (int64_t d = t.dim() - 1; d > 0; --d) {
    if (d == unit_dim || t.size(d) == 1) continue;
    if (positions == 1)
      step = t.stride(d);
    else if (t.stride(d) != step * positions)
      return std::nullopt;
    positions *= t.size(d);
  }
  return Strides{t.stride(0), step, t.size(unit_dim) == 1 ? 1 : t.stride(unit_dim)};
}

// The layout of the two as they are, if a loop can run along their memory.
inline std::optional<BlameLayout> shared_layout(const Tensor& a, const Tensor& delta, int64_t dim) {
  const int64_t samples = a.size(0), units = a.size(dim);
  int64_t positions = 1;
  for (int64_t d = 1; d < a.dim(); ++d)
    if (d != dim) positions *= a.size(d);
  if (samples * positions * units == 0)
    return BlameLayout{a, delta, {}, {}, samples, positions, units, true};
  const auto s = collapse(a, dim), t = collapse(delta, dim);
  if (!s || !t) return std::nullopt;
  const bool units_inner = s->u == 1 && t->u == 1 && (positions == 1 || units > 1);
  if (!units_inner && (positions == 1 || s->p != 1 || t->p != 1)) return std::nullopt;
  return BlameLayout{a, delta, *s, *t, samples, positions, units, units_inner};
}

inline BlameLayout blame_layout(const Tensor& a, const Tensor& delta, int64_t unit_dim) {
  const int64_t dims = a.dim(), dim = unit_dim < 0 ? unit_dim + dims : unit_dim;
  STD_TORCH_CHECK(dims >= 2, "activation: expected samples and units, at least 2 dims, got ", dims);
  STD_TORCH_CHECK(dim == 1 || dim == dims - 1, "unit_dim: expected 1 or the last dim of ", dims,
                  ", got ", unit_dim);
  check_same_shape(delta, "error", a, "activation");
  check_alike(delta, "error", a, "activation");
  if (const auto layout = shared_layout(a, delta, dim)) return *layout;
  if (shared_layout(a, a, dim))  // channels last, say: worth keeping
    if (const auto layout = shared_layout(a, with_strides_of(delta, a), dim)) return *layout;
  return *shared_layout(torch::stable::contiguous(a), torch::stable::contiguous(delta), dim);
}

inline ScalarType blame_dtype(const Tensor& activation) {
  const bool wide = activation.scalar_type() == ScalarType::Double;
  return wide ? ScalarType::Double : ScalarType::Float;
}

inline void check_blame_result(const Tensor& t, const char* name, int64_t rows,
                               const BlameLayout& layout) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == layout.units, name,
                  ": expected shape [", rows, ", ", layout.units, "]");
  STD_TORCH_CHECK(t.scalar_type() == blame_dtype(layout.activation), name,
                  ": expected float64 for a float64 activation, float32 for others");
  STD_TORCH_CHECK(t.device() == layout.activation.device(), name,
                  ": expected the device of activation");
  STD_TORCH_CHECK(t.is_contiguous(), name, ": expected a contiguous tensor to write into");
}
inline void check_blame_results(const BlameLayout& layout, const Tensor& contribution,
                                const Tensor& stats) {
  check_blame_result(contribution, "contribution", layout.samples, layout);
  check_blame_result(stats, "stats", stat_count, layout);
}

}  // namespace torchbp
