#include <torch/csrc/stable/library.h>

#include "cuda/dropout.cuh"
#include "cuda/launch.h"
#include "torchbp/dropout_check.h"

namespace torchbp {

static Tensor dropout_bits_cuda(const Tensor& kept_) {
  const torch::stable::accelerator::DeviceGuard guard(kept_.get_device_index());
  const Tensor kept = packed(kept_);
  const int64_t count = kept.numel(), bytes = ceil_div(count, 8);
  const Tensor bits = torch::stable::new_empty(kept, {bytes}, ScalarType::Byte);
  with_flag(kept, [&](auto flag) {
    using K = decltype(flag);
    if (count == 0) return;
    dropout_bits_kernel<K><<<flat_blocks(bytes), 256, 0, current_stream(kept)>>>(
        static_cast<const K*>(kept.const_data_ptr()), output<uint8_t>(bits), count);
    check_launch("dropout_bits");
  });
  return bits;
}

static Tensor dropout_apply_cuda(const Tensor& x_, const Tensor& bits_, double scale) {
  check_bits(x_, bits_);
  const torch::stable::accelerator::DeviceGuard guard(x_.get_device_index());
  const Tensor x = packed(x_), bits = packed(bits_), y = torch::stable::empty_like(x);
  with_scalar(x.scalar_type(), "x", [&](auto scalar) {
    using T = decltype(scalar);
    const int64_t count = x.numel();
    if (count == 0) return;
    dropout_apply_kernel<T><<<flat_blocks(count), 256, 0, current_stream(x)>>>(
        input<T>(x), input<uint8_t>(bits), output<T>(y), count, acc_t<T>(scale));
    check_launch("dropout_apply");
  });
  return y;
}

}  // namespace torchbp

STABLE_TORCH_LIBRARY_IMPL(torchbp, CUDA, m) {
  m.impl("dropout_bits", TORCH_BOX(&torchbp::dropout_bits_cuda));
  m.impl("dropout_apply", TORCH_BOX(&torchbp::dropout_apply_cuda));
}
