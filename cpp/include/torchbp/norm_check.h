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

// A statistic: `count` values in the dtype that sums are kept in.
inline void check_values(const Tensor& t, const char* name, int64_t count, const Tensor& x) {
  STD_TORCH_CHECK(t.numel() == count, name, ": expected ", count, " values, got ", t.numel());
  STD_TORCH_CHECK(t.scalar_type() == sum_dtype(x), name, ": expected ",
                  torch::headeronly::toString(sum_dtype(x)), ", got ",
                  torch::headeronly::toString(t.scalar_type()));
  STD_TORCH_CHECK(t.device() == x.device(), name, ": expected the device of x");
}

// A parameter: `count` values in the dtype of x, or in that of sums.
inline void check_parameter(const Optional& t, const char* name, int64_t count, const Tensor& x) {
  if (!t) return;
  if (t->scalar_type() != x.scalar_type()) return check_values(*t, name, count, x);
  STD_TORCH_CHECK(t->numel() == count, name, ": expected ", count, " values, got ", t->numel());
  check_alike(*t, name, x, "x");
}

inline void check_gradient(const Tensor& grad_output, const Tensor& x) {
  check_same_shape(grad_output, "grad_output", x, "x");
  check_alike(grad_output, "grad_output", x, "x");
}

// How rows of the last `dims` dims, taken together, lie in a tensor.
struct RowShape {
  std::vector<int64_t> outer, inner;
  int64_t rows = 1, columns = 1;

  RowShape(const Tensor& x, int64_t dims) {
    STD_TORCH_CHECK(0 < dims && dims <= x.dim(), "dims: expected 1 to ", x.dim(), ", got ", dims);
    for (int64_t d = 0; d < x.dim(); ++d) {
      const bool in = d >= x.dim() - dims;
      (in ? inner : outer).push_back(x.size(d));
      (in ? columns : rows) *= x.size(d);
    }
  }
  // One value for each row, the dims of the columns kept as dims of size 1.
  std::vector<int64_t> statistics() const {
    std::vector<int64_t> sizes = outer;
    sizes.resize(outer.size() + inner.size(), 1);
    return sizes;
  }
};

inline RowShape check_layer_norm(const Tensor& grad_output, const Tensor& x, const Optional& mean,
                                 const Tensor& rstd, const Optional& weight, int64_t dims) {
  const RowShape shape(x, dims);
  check_gradient(grad_output, x);
  if (mean) check_values(*mean, "mean", shape.rows, x);
  check_values(rstd, "rstd", shape.rows, x);
  check_parameter(weight, "weight", shape.columns, x);
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
  check_parameter(weight, "weight", x.size(1), x);
}

inline Optional packed_if(const Optional& t) { return t ? Optional(packed(*t)) : Optional(); }

// The elements in the type that sums are kept in; none where there is no tensor.
template <class A>
std::vector<A> values_of(const Optional& tensor) {
  std::vector<A> values;
  if (!tensor) return values;
  const Tensor t = packed(*tensor);
  with_scalar(t.scalar_type(), "weight", [&](auto scalar) {
    const auto* first = input<decltype(scalar)>(t);
    values.resize(t.numel());
    for (size_t i = 0; i < values.size(); ++i) values[i] = A(up(first[i]));
  });
  return values;
}
template <class A>
std::vector<A> weight_or_ones(const Optional& weight, int64_t count) {
  return weight ? values_of<A>(weight) : std::vector<A>(count, A(1));
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
