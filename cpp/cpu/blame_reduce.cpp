#include "torchbp/blame_reduce.h"

#include <torch/csrc/stable/library.h>

#include <array>
#include <tuple>
#include <vector>

#include "cpu/isa.h"
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

static std::tuple<Tensor, Tensor> blame_reduce_cpu(const Tensor& activation, const Tensor& error,
                                                   int64_t unit_dim, bool gradient) {
  const BlameLayout layout = blame_layout(activation, error, unit_dim);
  const bool wide = activation.scalar_type() == ScalarType::Double;
  const auto dtype = wide ? ScalarType::Double : ScalarType::Float;
  // Zeros where there is nothing to sum; the loops write every element otherwise.
  const auto results = [&](int64_t rows) {
    const std::array<int64_t, 2> size{rows, layout.units};
    return layout.count() == 0 ? torch::stable::new_zeros(activation, size, dtype)
                               : torch::stable::new_empty(activation, size, dtype);
  };
  const Tensor contribution = results(layout.samples), stats = results(stat_count);
  with_scalar(activation.scalar_type(), "activation", [&](auto scalar) {
    using T = decltype(scalar);
    if (layout.count() == 0) return;
    run<T>(layout, gradient, output<acc_t<T>>(contribution), output<acc_t<T>>(stats));
  });
  return {contribution, stats};
}

}  // namespace torchbp

STABLE_TORCH_LIBRARY_IMPL(torchbp, CPU, m) {
  m.impl("blame_reduce", TORCH_BOX(&torchbp::blame_reduce_cpu));
}
