#include "torchbp/elementwise.h"

#include <torch/csrc/stable/library.h>

#include <utility>

#include "cpu/isa.h"
#include "cpu/memory.h"
#include "torchbp/elementwise_check.h"

namespace torchbp {

template <class T>
using TangentRow = void (*)(const T*, const T*, T*, int64_t, acc_t<T>, acc_t<T>);

}  // namespace torchbp

#define TORCHBP_LOOPS "cpu/elementwise_loops.inc"
#include "cpu/each_isa.inc"

namespace torchbp {

static Tensor elementwise_backward_cpu(const Tensor& grad_, const Tensor& kept_, int64_t function,
                                       double a, double b) {
  check_elementwise(grad_, kept_, function);
  const Tensor result = in_huge_pages(fresh_like(kept_));
  const Tensor kept = with_strides_of(kept_, result), grad = with_strides_of(grad_, result);
  with_scalar(kept.scalar_type(), "kept", [&](auto scalar) {
    using T = decltype(scalar);
    const auto row = TORCHBP_PICK(tangent_loop<T>(int(function)));
    const T *g = input<T>(grad), *k = input<T>(kept);
    T* to = output<T>(result);
    const int64_t count = kept.numel(), grain = 16384;
    if (count <= grain) return row(g, k, to, count, acc_t<T>(a), acc_t<T>(b));
    torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
      row(g + begin, k + begin, to + begin, end - begin, acc_t<T>(a), acc_t<T>(b));
    });
  });
  return result;
}

}  // namespace torchbp

STABLE_TORCH_LIBRARY_IMPL(torchbp, CPU, m) {
  m.impl("elementwise_backward", TORCH_BOX(&torchbp::elementwise_backward_cpu));
}
