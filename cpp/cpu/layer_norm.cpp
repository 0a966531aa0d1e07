#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "cpu/isa.h"
#include "cpu/memory.h"
#include "torchbp/add_norm_check.h"
#include "torchbp/bits.h"
#include "torchbp/norm.h"

namespace torchbp {

template <class T>
struct LayerNorm {
  using A = acc_t<T>;
  const T *grad_output, *x;
  const A *mean, *rstd, *weight;  // no mean: null
  T* grad_input;
  int64_t rows, columns;
  // Of add_norm, whose sum is x: the gradient that reached the sum by other ways, and dropout.
  const T* grad_sum = nullptr;
  const uint8_t* mask = nullptr;
  A noise = 0;
  T* grad_branch = nullptr;
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
  const auto block = q.grad_sum == nullptr ? TORCHBP_PICK(layer_norm_block<false, T>)
                                           : TORCHBP_PICK(layer_norm_block<true, T>);
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

// `more` fills in what is add_norm's own. Returns the gradients of x, weight and bias.
template <class More>
static std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_, const Tensor& x_,
                                                   const Optional& mean_, const Tensor& rstd_,
                                                   const Optional& weight_, const RowShape& shape,
                                                   const More& more) {
  const Tensor x = packed(x_), grad = packed(grad_), rstd = packed(rstd_);
  const Optional mean = packed_if(mean_);
  const Tensor grad_input = in_huge_pages(fresh_like(x));
  const Tensor grad_weight = zeros(x, shape.inner, sum_dtype(x));
  const Tensor grad_bias = zeros(x, shape.inner, sum_dtype(x));
  with_scalar(x.scalar_type(), "x", [&](auto scalar) {
    using T = decltype(scalar);
    using A = acc_t<T>;
    if (x.numel() == 0) return;
    const std::vector<A> weight = weight_or_ones<A>(weight_, shape.columns);
    LayerNorm<T> q{input<T>(grad), input<T>(x),   mean ? input<A>(*mean) : nullptr,
                   input<A>(rstd), weight.data(), output<T>(grad_input),
                   shape.rows,     shape.columns};
    more(q);
    run(q, output<A>(grad_weight), output<A>(grad_bias));
  });
  return {grad_input, grad_weight, grad_bias};
}

static std::tuple<Tensor, Tensor, Tensor> layer_norm_backward_cpu(
    const Tensor& grad, const Tensor& x, const Optional& mean, const Tensor& rstd,
    const Optional& weight, int64_t dims) {
  const RowShape shape = check_layer_norm(grad, x, mean, rstd, weight, dims);
  return backward(grad, x, mean, rstd, weight, shape, [](auto&) {});
}

static std::tuple<Tensor, Tensor, Tensor, Tensor> add_norm_backward_cpu(
    const Tensor& grad, const Optional& grad_sum_, const Tensor& sum, const Optional& mean,
    const Tensor& rstd, const Optional& weight, const Optional& mask_, double p, int64_t dims) {
  const RowShape shape =
      check_add_norm_backward(grad, grad_sum_, sum, mean, rstd, weight, mask_, dims);
  const Optional grad_sum = packed_if(grad_sum_), mask = packed_if(mask_);
  const Tensor branch = mask ? in_huge_pages(fresh_like(packed(sum))) : fresh(sum, {0});
  const auto more = [&]<class T>(LayerNorm<T>& q) {
    if (grad_sum) q.grad_sum = input<T>(*grad_sum);
    if (!mask) return;
    q.mask = input<uint8_t>(*mask);
    q.noise = dropout_noise<T>(p);
    q.grad_branch = output<T>(branch);
  };
  const auto [of_sum, of_weight, of_bias] = backward(grad, sum, mean, rstd, weight, shape, more);
  return {branch, of_sum, of_weight, of_bias};
}

}  // namespace torchbp

STABLE_TORCH_LIBRARY_FRAGMENT(torchbp, m) {
  m.def(
      "add_norm_backward(Tensor grad_output, Tensor? grad_sum, Tensor sum, Tensor? mean,"
      " Tensor rstd, Tensor? weight, Tensor? mask, float p, int dims)"
      " -> (Tensor, Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(torchbp, CPU, m) {
  m.impl("layer_norm_backward", TORCH_BOX(&torchbp::layer_norm_backward_cpu));
  m.impl("add_norm_backward", TORCH_BOX(&torchbp::add_norm_backward_cpu));
}
