#include "torchbp/bias_act.h"

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <utility>
#include <vector>

#include "cpu/isa.h"
#include "cpu/memory.h"
#include "torchbp/bias_act_check.h"
#include "torchbp/tensor.h"

namespace torchbp {

// A tensor taken as rows of `width` elements, the bias repeated to that width.
template <class T>
struct BiasBackward {
  const T *grad_output, *x, *bias;
  T* grad_input;
  int64_t count, width;
  acc_t<T> alpha;
};

template <class T>
struct Loops {
  void (*forward_row)(const T*, const T*, T*, int64_t, acc_t<T>);
  void (*backward_row)(const T*, const T*, T*, int64_t, acc_t<T>);
  void (*backward_tile)(const BiasBackward<T>&, int64_t, int64_t, int64_t, int64_t, double*);
};

}  // namespace torchbp

#define TORCHBP_LOOPS "cpu/bias_act_loops.inc"
#include "cpu/each_isa.inc"

namespace torchbp {

using Bias = std::optional<Tensor>;
static constexpr int64_t short_row = 512, flat_row = 4096, grain = 16384;

// Rows shorter than a few vectors are joined: the bias is repeated until a row is long enough.
template <class T>
static std::vector<T> widen(const Tensor& bias) {
  const int64_t channels = bias.size(0), copies = std::max<int64_t>(1, short_row / channels);
  std::vector<T> wide(channels * copies);
  for (int64_t i = 0; i < copies; ++i)
    std::copy_n(input<T>(bias), channels, wide.begin() + i * channels);
  return wide;
}

template <class F>
static void each_row(int64_t count, int64_t width, const F& f) {
  torch::stable::parallel_for(0, ceil_div(count, width), ceil_div(grain, width),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t r = begin; r < end; ++r)
                                  f(r * width, std::min(width, count - r * width));
                              });
}

static Tensor bias_act_cpu(const Tensor& x_, const Bias& bias_, std::string act_name,
                           double alpha) {
  const Act act = parse_act(act_name);
  check_bias(x_, bias_);
  const Tensor like = bias_ ? torch::stable::contiguous(x_) : x_;
  const Tensor y = in_huge_pages(fresh_like(like)), x = with_strides_of(like, y);
  with_scalar(x.scalar_type(), "x", [&](auto scalar) {
    using T = decltype(scalar);
    if (x.numel() == 0) return;
    std::vector<T> bias;
    if (bias_) bias = widen<T>(torch::stable::contiguous(*bias_));
    const auto row = TORCHBP_PICK(loops<T>(act).forward_row);
    const T *from = input<T>(x), *b = bias_ ? bias.data() : nullptr;
    T* to = output<T>(y);
    each_row(x.numel(), b ? int64_t(bias.size()) : flat_row, [&](int64_t first, int64_t n) {
      row(from + first, b, to + first, n, acc_t<T>(alpha));
    });
  });
  return y;
}

// The gradient of the bias: tiles and row blocks summed apart, then joined in a fixed order.
template <class T>
static void backward_with_bias(BiasBackward<T> q, Act act, int64_t channels, T* grad_bias) {
  const Partition part(ceil_div(q.count, q.width), q.width, q.count);
  std::vector<double> sums(part.blocks * q.width);
  const auto tile = TORCHBP_PICK(loops<T>(act).backward_tile);
  torch::stable::parallel_for(0, part.tasks(), part.grain(), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t block = i / part.tiles, t = i % part.tiles, column = part.column_begin(t);
      tile(q, part.row_begin(block), part.row_end(block), column, part.column_end(t),
           sums.data() + block * q.width + column);
    }
  });
  const int64_t parts = int64_t(sums.size()) / channels;
  for (int64_t j = 0; j < channels; ++j) {
    double total = 0;
    for (int64_t i = 0; i < parts; ++i) total += sums[i * channels + j];
    grad_bias[j] = down<T>(acc_t<T>(total));
  }
}

static std::tuple<Tensor, Tensor> bias_act_backward_cpu(const Tensor& grad_, const Tensor& x_,
                                                        const Bias& bias_, std::string act_name,
                                                        double alpha) {
  const Act act = parse_act(act_name);
  check_bias(x_, bias_);
  check_same_shape(grad_, "grad_output", x_, "x");
  check_alike(grad_, "grad_output", x_, "x");
  const Tensor like = bias_ ? torch::stable::contiguous(x_) : x_;
  const Tensor grad_input = in_huge_pages(fresh_like(like));
  const Tensor x = with_strides_of(like, grad_input), g = with_strides_of(grad_, grad_input);
  const Tensor grad_bias = zeros(x, {bias_ ? bias_->size(0) : 0});
  with_scalar(x.scalar_type(), "x", [&](auto scalar) {
    using T = decltype(scalar);
    if (x.numel() == 0) return;
    const T *from = input<T>(x), *grad = input<T>(g);
    T* to = output<T>(grad_input);
    if (bias_) {
      const std::vector<T> bias = widen<T>(torch::stable::contiguous(*bias_));
      backward_with_bias<T>(
          {grad, from, bias.data(), to, x.numel(), int64_t(bias.size()), acc_t<T>(alpha)}, act,
          bias_->size(0), output<T>(grad_bias));
      return;
    }
    const auto row = TORCHBP_PICK(loops<T>(act).backward_row);
    each_row(x.numel(), flat_row, [&](int64_t first, int64_t n) {
      row(grad + first, from + first, to + first, n, acc_t<T>(alpha));
    });
  });
  return {grad_input, grad_bias};
}

}  // namespace torchbp

STABLE_TORCH_LIBRARY_IMPL(torchbp, CPU, m) {
  m.impl("bias_act", TORCH_BOX(&torchbp::bias_act_cpu));
  m.impl("bias_act_backward", TORCH_BOX(&torchbp::bias_act_backward_cpu));
}
