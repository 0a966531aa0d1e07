#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "cpu/isa.h"
#include "torchbp/norm.h"
#include "torchbp/norm_check.h"

namespace torchbp {

template <class T>
struct LayerNorm {
  const T *grad_output, *x;
  const acc_t<T>*mean, *rstd, *weight;  // no mean: null
  T* grad_input;
  int64_t rows, columns;
};

}  // namespace torchbp

#define TORCHBP_LOOPS "cpu/layer_norm_loops.inc"
#include "cpu/each_isa.inc"

namespace torchbp {

// Blocks of rows, cut by the shape alone; each sums its weight and bias gradients apart.
template <class T>
static void run(const LayerNorm<T>& q, acc_t<T>* grad_weight, acc_t<T>* grad_bias) {
  const int64_t elements = q.rows * q.columns;
  const int64_t wanted = std::clamp<int64_t>(elements >> 16, 1, std::min<int64_t>(64, q.rows));
  const int64_t block_rows = ceil_div(q.rows, wanted), blocks = ceil_div(q.rows, block_rows);
  std::vector<double> sums(blocks * 2 * q.columns);
  const auto block = TORCHBP_PICK(layer_norm_block<T>);
  const int64_t grain = ceil_div(16384, block_rows * q.columns);
  torch::stable::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    std::vector<acc_t<T>> partial(2 * q.columns);
    for (int64_t i = begin; i < end; ++i)
      block(q, i * block_rows, std::min(q.rows, (i + 1) * block_rows), partial.data(),
            sums.data() + i * 2 * q.columns);
  });
  double* total = sums.data();
  for (int64_t i = 1; i < blocks; ++i)
    for (int64_t j = 0; j < 2 * q.columns; ++j) total[j] += sums[i * 2 * q.columns + j];
  for (int64_t j = 0; j < q.columns; ++j) {
    grad_weight[j] = acc_t<T>(total[j]);
    grad_bias[j] = acc_t<T>(total[q.columns + j]);
  }
}

static std::tuple<Tensor, Tensor, Tensor> layer_norm_backward_cpu(
    const Tensor& grad_, const Tensor& x_, const Optional& mean_, const Tensor& rstd_,
    const Optional& weight_, int64_t dims) {
  const std::vector<int64_t> shape = check_layer_norm(grad_, x_, mean_, rstd_, weight_, dims);
  const Tensor x = packed(x_), grad = packed(grad_), rstd = packed(rstd_);
  const Tensor grad_input = torch::stable::empty_like(x);
  const Tensor grad_weight = torch::stable::new_zeros(x, shape, sum_dtype(x));
  const Tensor grad_bias = torch::stable::new_zeros(x, shape, sum_dtype(x));
  const int64_t rows = rstd.numel(), columns = grad_weight.numel();
  with_scalar(x.scalar_type(), "x", [&](auto scalar) {
    using T = decltype(scalar);
    using A = acc_t<T>;
    if (x.numel() == 0) return;
    Optional mean;
    if (mean_) mean.emplace(packed(*mean_));
    const std::vector<A> weight = weight_or_ones<A>(weight_, columns);
    run<T>({input<T>(grad), input<T>(x), mean ? input<A>(*mean) : nullptr, input<A>(rstd),
            weight.data(), output<T>(grad_input), rows, columns},
           output<A>(grad_weight), output<A>(grad_bias));
  });
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace torchbp

STABLE_TORCH_LIBRARY_IMPL(torchbp, CPU, m) {
  m.impl("layer_norm_backward", TORCH_BOX(&torchbp::layer_norm_backward_cpu));
}
