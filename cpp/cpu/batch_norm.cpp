#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "cpu/isa.h"
#include "cpu/memory.h"
#include "torchbp/norm.h"
#include "torchbp/norm_check.h"

namespace torchbp {

// Of one channel: the sums of g and of g (x - mean).
struct ChannelSums {
  double sum, product;
};
// The mean and what NormGradient holds, for channels that lie next to each other.
template <class A>
struct ChannelGradients {
  const A *mean, *scale, *slope, *shift;
};
// Samples x channels x positions. A statistic belongs to a channel of all samples (batch norm), or
// to a group of channels of one sample; channel c of sample n is plane n * channels + c.
template <class T>
struct BatchNorm {
  const T *grad_output, *x;
  const acc_t<T>*mean, *rstd, *weight;
  T* grad_input;
  int64_t samples, channels, positions, groups;  // no groups: batch norm

  int64_t statistics() const { return groups == 0 ? channels : samples * groups; }
};

// The planes that share a statistic, and the weights of their channels.
template <class T>
struct Planes {
  int64_t count, first, step, weight_step;
  const acc_t<T>* weights;

  TORCHBP_HD Planes(const BatchNorm<T>& q, int64_t statistic) {
    const bool batch = q.groups == 0;
    count = batch ? q.samples : q.channels / q.groups;
    first = batch ? statistic : statistic * count;
    step = batch ? q.channels : 1;
    weight_step = batch ? 0 : 1;
    weights = q.weight + (batch ? statistic : statistic % q.groups * count);
  }
  TORCHBP_HD int64_t operator[](int64_t i) const { return first + i * step; }
  TORCHBP_HD double weight(int64_t i) const { return double(weights[i * weight_step]); }
};

template <class T>
struct BatchNormLoops {
  using A = acc_t<T>;
  void (*over_statistic)(const BatchNorm<T>&, int64_t, ChannelSums*);
  void (*row_sums)(const T*, const T*, const A*, int64_t, int64_t, int64_t, ChannelSums*);
  void (*row_gradient)(const T*, const T*, T*, const ChannelGradients<A>&, int64_t, int64_t);
};

}  // namespace torchbp

#define TORCHBP_LOOPS "cpu/batch_norm_loops.inc"
#include "cpu/each_isa.inc"

namespace torchbp {

// Positions innermost: every statistic is a task of its own.
template <class T>
static void over_planes(const BatchNorm<T>& q, const BatchNormLoops<T>& loops, ChannelSums* sums) {
  const int64_t elements = q.samples * q.channels * q.positions / q.statistics();
  torch::stable::parallel_for(0, q.statistics(), ceil_div(16384, elements),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t s = begin; s < end; ++s)
                                  loops.over_statistic(q, s, sums);
                              });
}

// Channels innermost: the sums of tiles and row blocks apart, joined in a fixed order; then the
// gradient. The samples of batch norm count as positions of a single one.
template <class T>
static void over_rows(const BatchNorm<T>& q, const BatchNormLoops<T>& loops, ChannelSums* sums) {
  using A = acc_t<T>;
  const int64_t planes = q.samples * q.channels, sample = q.positions * q.channels;
  const int64_t per_statistic = q.groups == 0 ? 1 : q.channels / q.groups;
  std::vector<A> values(4 * planes);
  A *mean = values.data(), *scale = mean + planes, *slope = scale + planes, *shift = slope + planes;
  for (int64_t p = 0; p < planes; ++p) mean[p] = q.mean[p / per_statistic];

  const Partition part(q.positions, q.channels, sample);
  std::vector<ChannelSums> parts(part.blocks * planes);
  torch::stable::parallel_for(
      0, q.samples * part.tasks(), part.grain(), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t n = i / part.tasks(), block = i % part.tasks() / part.tiles;
          const int64_t t = i % part.tiles, column = part.column_begin(t);
          const int64_t row = part.row_begin(block), plane = n * q.channels + column;
          const int64_t at = n * sample + row * q.channels + column;
          loops.row_sums(q.grad_output + at, q.x + at, mean + plane, part.row_end(block) - row,
                         q.channels, part.column_end(t) - column,
                         parts.data() + block * planes + plane);
        }
      });
  for (int64_t block = 0; block < part.blocks; ++block)
    for (int64_t p = 0; p < planes; ++p) {
      sums[p].sum += parts[block * planes + p].sum;
      sums[p].product += parts[block * planes + p].product;
    }
  for (int64_t s = 0; s < q.statistics(); ++s) {
    const Planes<T> of(q, s);
    const double rstd = double(q.rstd[s]);
    double sum = 0, product = 0;
    for (int64_t i = 0; i < of.count; ++i) {
      sum += of.weight(i) * sums[of[i]].sum;
      product += of.weight(i) * sums[of[i]].product;
    }
    const auto common = norm_gradient<A>(rstd, sum, product, double(of.count * q.positions));
    for (int64_t i = 0; i < of.count; ++i) {
      scale[of[i]] = A(rstd * of.weight(i));
      slope[of[i]] = common.slope;
      shift[of[i]] = common.shift;
    }
  }
  const int64_t rows = std::min(q.positions, ceil_div(16384, q.channels));
  const int64_t blocks = ceil_div(q.positions, rows);
  torch::stable::parallel_for(0, q.samples * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / blocks, row = i % blocks * rows, p = n * q.channels;
      const int64_t at = n * sample + row * q.channels;
      loops.row_gradient(q.grad_output + at, q.x + at, q.grad_input + at,
                         {mean + p, scale + p, slope + p, shift + p},
                         std::min(rows, q.positions - row), q.channels);
    }
  });
}

// Joins what the planes of a channel contribute to its parameters, sample by sample.
template <class T>
static void of_parameters(const BatchNorm<T>& q, const std::vector<ChannelSums>& sums,
                          acc_t<T>* grad_weight, acc_t<T>* grad_bias) {
  std::vector<double> of_weight(q.channels), of_bias(q.channels);
  const int64_t per_statistic = q.groups == 0 ? 1 : q.channels / q.groups;
  for (int64_t n = 0; n < q.samples; ++n) {
    const ChannelSums* of = sums.data() + n * q.channels;
    const acc_t<T>* rstd = q.rstd + n * q.groups;
    for (int64_t c = 0; c < q.channels; ++c) {
      of_weight[c] += double(rstd[c / per_statistic]) * of[c].product;
      of_bias[c] += of[c].sum;
    }
  }
  for (int64_t c = 0; c < q.channels; ++c) {
    grad_weight[c] = acc_t<T>(of_weight[c]);
    grad_bias[c] = acc_t<T>(of_bias[c]);
  }
}

static std::tuple<Tensor, Tensor, Tensor> batch_norm_backward_cpu(
    const Tensor& grad_, const Tensor& x_, const Tensor& mean_, const Tensor& rstd_,
    const Optional& weight_, bool training) {
  check_batch_norm(grad_, x_, mean_, rstd_, weight_, training);
  const bool rows = channels_innermost(x_);
  const Tensor x = rows ? x_ : packed(x_);
  const Tensor grad_input = in_huge_pages(fresh_like(x)), grad = with_strides_of(grad_, x);
  const Tensor mean = packed(mean_), rstd = packed(rstd_);
  const int64_t samples = x.size(0), channels = x.size(1);
  const Tensor grad_weight = zeros(x, {channels}, sum_dtype(x));
  const Tensor grad_bias = zeros(x, {channels}, sum_dtype(x));
  with_scalar(x.scalar_type(), "x", [&](auto scalar) {
    using T = decltype(scalar);
    using A = acc_t<T>;
    if (x.numel() == 0) return;
    const std::vector<A> weight = weight_or_ones<A>(weight_, channels);
    BatchNorm<T> q{input<T>(grad),
                   input<T>(x),
                   input<A>(mean),
                   input<A>(rstd),
                   weight.data(),
                   output<T>(grad_input),
                   samples,
                   channels,
                   x.numel() / (samples * channels),
                   mean.dim() == 2 ? mean.size(1) : 0};
    if (rows && q.groups == 0) {
      q.positions *= samples;
      q.samples = 1;
    }
    std::vector<ChannelSums> sums(q.samples * channels);
    const BatchNormLoops<T> loops = TORCHBP_PICK(batch_norm_loops<T>(training));
    rows ? over_rows(q, loops, sums.data()) : over_planes(q, loops, sums.data());
    of_parameters(q, sums, output<A>(grad_weight), output<A>(grad_bias));
  });
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace torchbp

STABLE_TORCH_LIBRARY_IMPL(torchbp, CPU, m) {
  m.impl("batch_norm_backward", TORCH_BOX(&torchbp::batch_norm_backward_cpu));
}
