#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cuda/blame_reduce.cuh"
#include "cuda/launch.h"
#include "torchbp/blame_reduce_check.h"

namespace torchbp {

template <class T>
static void launch(const BlameLayout& layout, bool gradient, const Tensor& contribution,
                   const Tensor& stats) {
  using A = acc_t<T>;
  const RowBlocks part(layout.samples, layout.count());
  const int64_t size = stat_count * layout.units;
  const Tensor sums = torch::stable::new_empty(stats, {part.blocks, size});
  const BlameArguments<T> q{input<T>(layout.activation),
                            input<T>(layout.error),
                            output<A>(contribution),
                            output<A>(sums),
                            layout.activation_strides,
                            layout.error_strides,
                            layout.samples,
                            layout.positions,
                            layout.units,
                            part.rows};
  const int64_t columns = layout.units_inner ? ceil_div(layout.units, lanes_x) : layout.units;
  const dim3 grid(unsigned(columns), unsigned(part.blocks)), block(lanes_x, lanes_y);
  const cudaStream_t stream = current_stream(stats);
  const auto kernel =
      layout.units_inner
          ? (gradient ? units_inner_kernel<true, T> : units_inner_kernel<false, T>)
          : (gradient ? positions_inner_kernel<true, T> : positions_inner_kernel<false, T>);
  kernel<<<grid, block, 0, stream>>>(q);
  join_kernel<A>
      <<<flat_blocks(size), 256, 0, stream>>>(input<A>(sums), output<A>(stats), part.blocks, size);
  check_launch("blame_reduce");
}

static void reduce(const BlameLayout& layout, bool gradient, const Tensor& contribution,
                   const Tensor& stats) {
  with_scalar(layout.activation.scalar_type(), "activation", [&](auto scalar) {
    if (layout.count() > 0) launch<decltype(scalar)>(layout, gradient, contribution, stats);
  });
}

static std::tuple<Tensor, Tensor> blame_reduce_cuda(const Tensor& activation, const Tensor& error,
                                                    int64_t unit_dim, bool gradient) {
  const torch::stable::accelerator::DeviceGuard guard(activation.get_device_index());
  const BlameLayout layout = blame_layout(activation, error, unit_dim);
  const ScalarType dtype = blame_dtype(activation);
  const Tensor contribution =
      torch::stable::new_zeros(activation, {layout.samples, layout.units}, dtype);
  const Tensor stats = torch::stable::new_zeros(activation, {stat_count, layout.units}, dtype);
  reduce(layout, gradient, contribution, stats);
  return {contribution, stats};
}

static void blame_reduce_into_cuda(const Tensor& activation, const Tensor& error, int64_t unit_dim,
                                   bool gradient, const Tensor& contribution, const Tensor& stats) {
  const torch::stable::accelerator::DeviceGuard guard(activation.get_device_index());
  const BlameLayout layout = blame_layout(activation, error, unit_dim);
  check_blame_results(layout, contribution, stats);
  if (layout.count() == 0) {  // the kernels write every element otherwise
    for (Tensor t : {contribution, stats}) torch::stable::zero_(t);
    return;
  }
  reduce(layout, gradient, contribution, stats);
}

}  // namespace torchbp

STABLE_TORCH_LIBRARY_IMPL(torchbp, CUDA, m) {
  m.impl("blame_reduce", TORCH_BOX(&torchbp::blame_reduce_cuda));
  m.impl("blame_reduce_into", TORCH_BOX(&torchbp::blame_reduce_into_cuda));
}
