#include "torchbp/gated.h"

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <utility>

#include "cpu/isa.h"
#include "cpu/memory.h"
#include "torchbp/gated_check.h"

namespace torchbp {

template <class T>
struct GatedLoops {
  void (*forward)(const T*, const T*, T*, int64_t);
  void (*backward)(const T*, const T*, const T*, T*, T*, int64_t);
};

}  // namespace torchbp

#define TORCHBP_LOOPS "cpu/gated_loops.inc"
#include "cpu/each_isa.inc"

namespace torchbp {

// Calls f(row, column, n) for pieces of the rows.
template <class F>
static void each_piece(int64_t rows, int64_t width, const F& f) {
  const int64_t longest = 4096, pieces = ceil_div(width, longest);
  const int64_t grain = ceil_div(16384, std::min(width, longest));
  torch::stable::parallel_for(0, rows * pieces, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t column = i % pieces * longest;
      f(i / pieces, column, std::min(longest, width - column));
    }
  });
}

static Tensor gated_cpu(const Tensor& value, const std::optional<Tensor>& gate, std::string name) {
  const Act act = parse_gate(name);
  check_gated(value, gate);
  const Tensor y = in_huge_pages(gated_result(value, gate));
  with_scalar(value.scalar_type(), "value", [&](auto scalar) {
    using T = decltype(scalar);
    if (y.numel() == 0) return;
    const GatedRows q = gated_rows(value, gate, y);
    const auto row = TORCHBP_PICK(gated_loops<T>(act).forward);
    const T *a = input<T>(q.value), *b = input<T>(q.gate) + q.gate_begin;
    T* to = output<T>(y);
    each_piece(q.rows, q.width, [&](int64_t r, int64_t c, int64_t n) {
      row(a + r * q.value_step + c, b + r * q.gate_step + c, to + r * q.width + c, n);
    });
  });
  return y;
}

static std::tuple<Tensor, Tensor> gated_backward_cpu(const Tensor& grad_, const Tensor& value,
                                                     const std::optional<Tensor>& gate,
                                                     std::string name) {
  const Act act = parse_gate(name);
  check_gated(value, gate);
  check_gated_gradient(grad_, value, gate);
  const Tensor like = gate ? value : packed(value);
  const Tensor of_value = in_huge_pages(fresh_like(like));
  const Tensor of_gate = gate ? in_huge_pages(fresh_like(like)) : fresh(value, {0});
  with_scalar(value.scalar_type(), "value", [&](auto scalar) {
    using T = decltype(scalar);
    if (grad_.numel() == 0) return;
    const Tensor grad = gate ? with_strides_of(grad_, of_value) : packed(grad_);
    const GatedRows q = gated_rows(value, gate, grad);
    const auto row = TORCHBP_PICK(gated_loops<T>(act).backward);
    const T *g = input<T>(grad), *a = input<T>(q.value), *b = input<T>(q.gate) + q.gate_begin;
    T *to_a = output<T>(of_value), *to_b = gate ? output<T>(of_gate) : to_a + q.width;
    const int64_t step = gate ? q.width : 2 * q.width;
    each_piece(q.rows, q.width, [&](int64_t r, int64_t c, int64_t n) {
      row(g + r * q.width + c, a + r * q.value_step + c, b + r * q.gate_step + c,
          to_a + r * step + c, to_b + r * step + c, n);
    });
  });
  return {of_value, of_gate};
}

}  // namespace torchbp

STABLE_TORCH_LIBRARY_FRAGMENT(torchbp, m) {
  m.def("gated(Tensor value, Tensor? gate, str act) -> Tensor");
  m.def(
      "gated_backward(Tensor grad_output, Tensor value, Tensor? gate, str act)"
      " -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(torchbp, CPU, m) {
  m.impl("gated", TORCH_BOX(&torchbp::gated_cpu));
  m.impl("gated_backward", TORCH_BOX(&torchbp::gated_backward_cpu));
}
