// Arguments of bias_act, checked the same way on every device.
#pragma once
#include <cstring>
#include <optional>
#include <string>

#include "torchbp/bias_act.h"
#include "torchbp/tensor.h"

namespace torchbp {

inline Act parse_act(const std::string& name) {
  for (int i = 0; i < act_count; ++i)
    if (name == act_names[i]) return static_cast<Act>(i);
  STD_TORCH_CHECK(
      false,
      "act: expected identity, relu, leaky_relu, gelu, gelu_tanh, silu, tanh or sigmoid, "
      "got ",
      name);
}

inline void check_bias(const Tensor& x, const std::optional<Tensor>& bias) {
  if (!bias) return;
  const int64_t channels = x.dim() > 0 ? x.size(x.dim() - 1) : -1;
  STD_TORCH_CHECK(channels >= 0 && bias->dim() == 1 && bias->size(0) == channels,
                  "bias: expected one value for each of the ", channels,
                  " entries of the last dim of x, got ", bias->numel(), " in ", bias->dim(),
                  " dims");
  check_alike(*bias, "bias", x, "x");
}

}  // namespace torchbp
