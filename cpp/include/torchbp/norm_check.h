// Arguments of the norms' backward passes, checked the same way on every device.
#pragma once
#include <optional>
#include <vector>

#include "torchbp/norm.h"
#include "torchbp/tensor.h"

namespace torchbp {

using Optional = std::optional<Tensor>;

inline ScalarType sum_dtype(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// A statistic or a parameter: `count` values in the dtype that sums are kept in.
inline void check_values(const Tensor& t, const char* name, int64_t count, const Tensor& x) {
  STD_TORCH_CHECK(t.numel() == count, name, ": expected ", count, " values, got ", t.numel());
  STD_TORCH_CHECK(t.scalar_type() == sum_dtype(x), name, ": expected ",
                  torch::headeronly::toString(sum_dtype(x)), ", got ",
                  torch::headeronly::toString(t.scalar_type()));
  STD_TORCH_CHECK(t.device() == x.device(), name, ": expected the device of x");
}

inline void check_gradient(const Tensor& grad_output, const Tensor& x) {
  check_same_shape(grad_output, "grad_output", x, "x");
  check_alike(grad_output, "grad_output", x, "x");
}

// Returns the shape of the weight.
inline std::vector<int64_t> check_layer_norm(const Tensor& grad_output, const Tensor& x,
                                             const Optional& mean, const Tensor& rstd,
                                             const Optional& weight, int64_t dims) {
  STD_TORCH_CHECK(0 < dims && dims <= x.dim(), "dims: expected 1 to ", x.dim(), ", got ", dims);
  check_gradient(grad_output, x);
  const auto sizes = x.sizes();
  const std::vector<int64_t> shape(sizes.end() - dims, sizes.end());
  int64_t rows = 1, columns = 1;
  for (int64_t d = 0; d < x.dim(); ++d) (d < x.dim() - dims ? rows : columns) *= x.size(d);
  if (mean) check_values(*mean, "mean", rows, x);
  check_values(rstd, "rstd", rows, x);
  if (weight) check_values(*weight, "weight", columns, x);
  return shape;
}

inline void check_batch_norm(const Tensor& grad_output, const Tensor& x, const Tensor& mean,
                             const Tensor& rstd, const Optional& weight, bool training) {
  STD_TORCH_CHECK(x.dim() >= 2, "x: expected samples and channels, at least 2 dims, got ", x.dim());
  check_gradient(grad_output, x);
  if (mean.dim() == 2) {
    const int64_t groups = mean.size(1);
    STD_TORCH_CHECK(training, "training: statistics of groups are those of the input");
    STD_TORCH_CHECK(mean.size(0) == x.size(0) && groups > 0 && x.size(1) % groups == 0,
                    "mean: expected samples x groups that divide the ", x.size(1), " channels of ",
                    x.size(0), " samples, got ", mean.size(0), " x ", groups);
    check_same_shape(rstd, "rstd", mean, "mean");
    check_values(mean, "mean", mean.numel(), x);
    check_values(rstd, "rstd", mean.numel(), x);
  } else {
    check_values(mean, "mean", x.size(1), x);
    check_values(rstd, "rstd", x.size(1), x);
  }
  if (weight) check_values(*weight, "weight", x.size(1), x);
}

template <class A>
std::vector<A> weight_or_ones(const Optional& weight, int64_t count) {
  std::vector<A> values(count, A(1));
  if (weight) std::copy_n(input<A>(packed(*weight)), count, values.begin());
  return values;
}

// Whether channels, not positions, are innermost in memory, and all else follows in order.
inline bool channels_innermost(const Tensor& t) {
  int64_t expected = 1;
  const auto fits = [&](int64_t d) {
    const bool fit = t.size(d) == 1 || t.stride(d) == expected;
    expected *= t.size(d);
    return fit;
  };
  bool fit = fits(1);
  for (int64_t d = t.dim() - 1; d > 1; --d) fit = fits(d) && fit;
  return fits(0) && fit && (t.size(1) > 1 || t.numel() == t.size(0));
}

}  // namespace torchbp
