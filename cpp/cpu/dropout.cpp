#include "torchbp/dropout.h"

#include <torch/csrc/stable/library.h>

#include "cpu/isa.h"
#include "cpu/memory.h"
#include "torchbp/dropout_check.h"

#define TORCHBP_LOOPS "cpu/dropout_loops.inc"
#include "cpu/each_isa.inc"

namespace torchbp {

// Calls f(first, n) for pieces of `count` elements that begin at a byte of the bits.
template <class F>
static void each_span(int64_t count, const F& f) {
  torch::stable::parallel_for(0, ceil_div(count, 8), 2048, [&](int64_t begin, int64_t end) {
    f(begin * 8, std::min(end * 8, count) - begin * 8);
  });
}

static Tensor dropout_bits_cpu(const Tensor& kept_) {
  const Tensor kept = packed(kept_);
  const int64_t count = kept.numel();
  const Tensor bits = fresh(kept, {ceil_div(count, 8)}, ScalarType::Byte);
  with_flag(kept, [&](auto flag) {
    using K = decltype(flag);
    const auto row = TORCHBP_PICK(pack_row<K>);
    const K* from = static_cast<const K*>(kept.const_data_ptr());
    uint8_t* to = output<uint8_t>(bits);
    if (count > 0)
      each_span(count, [&](int64_t first, int64_t n) { row(from + first, to + first / 8, n); });
  });
  return bits;
}

static Tensor dropout_apply_cpu(const Tensor& x_, const Tensor& bits_, double scale) {
  check_bits(x_, bits_);
  const Tensor x = packed(x_), bits = packed(bits_);
  const Tensor y = in_huge_pages(fresh_like(x));
  with_scalar(x.scalar_type(), "x", [&](auto scalar) {
    using T = decltype(scalar);
    const auto row = TORCHBP_PICK(apply_row<T>);
    const T* from = input<T>(x);
    const uint8_t* b = input<uint8_t>(bits);
    T* to = output<T>(y);
    if (x.numel() > 0)
      each_span(x.numel(), [&](int64_t first, int64_t n) {
        row(from + first, b + first / 8, to + first, n, acc_t<T>(scale));
      });
  });
  return y;
}

}  // namespace torchbp

STABLE_TORCH_LIBRARY_FRAGMENT(torchbp, m) {
  m.def("dropout_bits(Tensor kept) -> Tensor");
  m.def("dropout_apply(Tensor x, Tensor bits, float scale) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(torchbp, CPU, m) {
  m.impl("dropout_bits", TORCH_BOX(&torchbp::dropout_bits_cpu));
  m.impl("dropout_apply", TORCH_BOX(&torchbp::dropout_apply_cpu));
}
