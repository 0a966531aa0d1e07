#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/isa.h"
#include "cpu/memory.h"
#include "torchbp/add_norm_check.h"
#include "torchbp/bits.h"

namespace torchbp {

template <class T>
struct AddNorm {
  using A = acc_t<T>;
  const T *x, *residual;
  const uint8_t* mask;     // none: null
  const A *weight, *bias;  // none: null
  T *y, *sum;              // without a residual x is normalised, and sum is null
  A *mean, *rstd;          // mean is null for RMS norm
  A noise;                 // what dropout multiplies by what it keeps
  double eps;
  int64_t rows, columns;
};

}  // namespace torchbp

#define TORCHBP_LOOPS "cpu/add_norm_loops.inc"
#include "cpu/each_isa.inc"

namespace torchbp {

template <class T>
static void run(const AddNorm<T>& q) {
  const auto rows = TORCHBP_PICK(add_norm_rows<T>);
  torch::stable::parallel_for(0, q.rows, ceil_div(16384, std::max<int64_t>(1, q.columns)),
                              [&](int64_t begin, int64_t end) { rows(q, begin, end); });
}

static std::tuple<Tensor, Tensor, Tensor, Tensor> add_norm_cpu(
    const Tensor& x_, const Optional& residual_, const Optional& mask_, double p,
    const Optional& weight_, const Optional& bias_, int64_t dims, bool centre, double eps) {
  const RowShape shape = check_add_norm(x_, residual_, mask_, weight_, bias_, dims);
  const Tensor x = packed(x_), y = in_huge_pages(fresh_like(x));
  const Optional residual = packed_if(residual_), mask = packed_if(mask_);
  const Tensor sum = residual ? in_huge_pages(fresh_like(x)) : fresh(x, {0});
  const Tensor rstd = fresh(x, shape.statistics(), sum_dtype(x));
  const Tensor mean = centre ? fresh_like(rstd) : fresh(rstd, {0});
  with_scalar(x.scalar_type(), "x", [&](auto scalar) {
    using T = decltype(scalar);
    using A = acc_t<T>;
    if (rstd.numel() == 0) return;
    const std::vector<A> weight = values_of<A>(weight_), bias = values_of<A>(bias_);
    run<T>({input<T>(x), residual ? input<T>(*residual) : nullptr,
            mask ? input<uint8_t>(*mask) : nullptr, weight_ ? weight.data() : nullptr,
            bias_ ? bias.data() : nullptr, output<T>(y), residual ? output<T>(sum) : nullptr,
            centre ? output<A>(mean) : nullptr, output<A>(rstd), dropout_noise<T>(p), eps,
            shape.rows, shape.columns});
  });
  return {y, sum, mean, rstd};
}

}  // namespace torchbp

STABLE_TORCH_LIBRARY_FRAGMENT(torchbp, m) {
  m.def(
      "add_norm(Tensor x, Tensor? residual, Tensor? mask, float p, Tensor? weight,"
      " Tensor? bias, int dims, bool centre, float eps) -> (Tensor, Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(torchbp, CPU, m) {
  m.impl("add_norm", TORCH_BOX(&torchbp::add_norm_cpu));
}
