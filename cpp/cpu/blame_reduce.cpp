#include "torchbp/blame_reduce.h"

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "cpu/isa.h"
#include "cpu/memory.h"
#include "torchbp/blame_reduce_check.h"
#include "torchbp/tensor.h"

namespace torchbp {

template <class T>
struct Blame {
  const T *activation, *error;
  acc_t<T>* contribution;
  Strides as, ds;
  int64_t positions, units;
};
template <class T>
using BlameTile = void (*)(const Blame<T>&, int64_t, int64_t, int64_t, int64_t, double*);

}  // namespace torchbp

#define TORCHBP_LOOPS "cpu/blame_reduce_loops.inc"
#include "cpu/each_isa.inc"

namespace torchbp {

template <class T>
static void run(const BlameLayout& layout, bool gradient, acc_t<T>* contribution, acc_t<T>* stats) {
  const Blame<T> q{
      input<T>(layout.activation), input<T>(layout.error), contribution, layout.activation_strides,
      layout.error_strides,        layout.positions,       layout.units};
  const auto tile = TORCHBP_PICK(pick_tile<T>(gradient, layout.units_inner, layout.positions == 1));
  const Partition part(layout.samples, layout.units, layout.count(), blame_tile);
  const int64_t size = stat_count * layout.units;
  std::vector<double> sums(part.blocks * size);
  torch::stable::parallel_for(0, part.tasks(), part.grain(), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t block = i / part.tiles, t = i % part.tiles;
      tile(q, part.row_begin(block), part.row_end(block), part.column_begin(t), part.column_end(t),
           sums.data() + block * size);
    }
  });
  for (int64_t j = 0; j < size; ++j) {
    double total = 0;
    for (int64_t block = 0; block < part.blocks; ++block) total += sums[block * size + j];
    stats[j] = acc_t<T>(total);
  }
}

static void reduce(const BlameLayout& layout, bool gradient, const Tensor& contribution,
                   const Tensor& stats) {
  if (layout.count() == 0) {  // the loops write every element otherwise
    clear(contribution);
    clear(stats);
    return;
  }
  with_scalar(layout.activation.scalar_type(), "activation", [&](auto scalar) {
    using T = decltype(scalar);
    run<T>(layout, gradient, output<acc_t<T>>(contribution), output<acc_t<T>>(stats));
  });
}

static std::tuple<Tensor, Tensor> blame_reduce_cpu(const Tensor& activation, const Tensor& error,
                                                   int64_t unit_dim, bool gradient) {
  const BlameLayout layout = blame_layout(activation, error, unit_dim);
  const ScalarType dtype = blame_dtype(activation);
  const Tensor contribution = fresh(activation, {layout.samples, layout.units}, dtype);
  const Tensor stats = fresh(activation, {stat_count, layout.units}, dtype);
  reduce(layout, gradient, contribution, stats);
  return {contribution, stats};
}

static void blame_reduce_into_cpu(const Tensor& activation, const Tensor& error, int64_t unit_dim,
                                  bool gradient, const Tensor& contribution, const Tensor& stats) {
  const BlameLayout layout = blame_layout(activation, error, unit_dim);
  check_blame_results(layout, contribution, stats);
  reduce(layout, gradient, contribution, stats);
}

}  // namespace torchbp

STABLE_TORCH_LIBRARY_IMPL(torchbp, CPU, m) {
  m.impl("blame_reduce", TORCH_BOX(&torchbp::blame_reduce_cpu));
  m.impl("blame_reduce_into", TORCH_BOX(&torchbp::blame_reduce_into_cpu));
}
