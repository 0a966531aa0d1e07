#include <torch/csrc/stable/library.h>

#include "cpu/isa.h"
#include "torchbp/elementary.h"
#include "torchbp/softmax_check.h"

#define TORCHBP_LOOPS "cpu/softmax_loops.inc"
#include "cpu/each_isa.inc"

namespace torchbp {

static Tensor softmax_backward_cpu(const Tensor& grad_, const Tensor& output_, bool logarithm) {
  check_softmax(grad_, output_);
  const Tensor grad = torch::stable::contiguous(grad_), y = torch::stable::contiguous(output_);
  const Tensor result = fresh_like(y);
  const int64_t count = y.numel(), width = row_width(y);
  with_scalar(y.scalar_type(), "output", [&](auto scalar) {
    using T = decltype(scalar);
    if (count == 0) return;
    const auto row = logarithm ? TORCHBP_PICK(log_softmax_row<T>) : TORCHBP_PICK(softmax_row<T>);
    const T *g = input<T>(grad), *from = input<T>(y);
    T* to = output<T>(result);
    torch::stable::parallel_for(0, count / width, ceil_div(16384, width),
                                [&](int64_t begin, int64_t end) {
                                  for (int64_t i = begin * width; i < end * width; i += width)
                                    row(g + i, from + i, to + i, width);
                                });
  });
  return result;
}

}  // namespace torchbp

STABLE_TORCH_LIBRARY_IMPL(torchbp, CPU, m) {
  m.impl("softmax_backward", TORCH_BOX(&torchbp::softmax_backward_cpu));
}
