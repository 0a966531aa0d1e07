#include <torch/csrc/stable/library.h>

#include <vector>

#include "cpu/memory.h"
#include "torchbp/conv.h"
#include "torchbp/tensor.h"

namespace torchbp {

using Sizes = std::vector<int64_t>;

static void check_setting(const char* name, const Sizes& values, int64_t dims, int64_t least) {
  bool right = int64_t(values.size()) == dims;
  for (const int64_t value : values) right &= value >= least;
  STD_TORCH_CHECK(right, name, ": expected ", dims, " numbers from ", least, " on");
}

static void check_tensors(const Tensor& grad, const Tensor& x) {
  const int64_t dims = x.dim() - 2;
  STD_TORCH_CHECK(dims >= 1 && dims <= 3,
                  "x: expected 1 to 3 dims beside samples and channels, got ", dims);
  STD_TORCH_CHECK(grad.dim() == x.dim() && grad.size(0) == x.size(0),
                  "grad_output: expected the dims and samples of x");
  check_alike(grad, "grad_output", x, "x");
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double,
                  "x: expected float32 or float64, got ",
                  torch::headeronly::toString(x.scalar_type()));
}

template <class T>
static Planes<T> planes(const Tensor& t) {
  Planes<T> p{input<T>(t), t.stride(0), t.stride(1), {0, 0, 0}, {1, 1, 1}};
  for (int64_t d = 2; d < t.dim(); ++d) {
    p.step[3 - t.dim() + d] = t.stride(d);
    p.size[3 - t.dim() + d] = t.size(d);
  }
  return p;
}

// The loops go along the width, or along channels that lie next to each other.
static Tensor in_lines(const Tensor& t, bool by_channel) {
  const bool lines = t.stride(t.dim() - 1) == 1 || (by_channel && t.stride(1) == 1);
  return lines ? t : torch::stable::contiguous(t);
}

template <class T>
static void run(const Conv& conv, const Tensor& grad, const Tensor& x, const Tensor& result) {
  const auto compute = conv.inputs == 1 ? depthwise_grad_weight<T> : dense_grad_weight<T>;
  compute(conv, planes<T>(grad), planes<T>(x), output<T>(result));
}

static Tensor conv_grad_weight_cpu(const Tensor& grad, const Tensor& x, const Sizes& kernel,
                                   const Sizes& stride, const Sizes& padding, const Sizes& dilation,
                                   int64_t groups) {
  check_tensors(grad, x);
  const int64_t dims = x.dim() - 2;
  check_setting("kernel", kernel, dims, 1);
  check_setting("stride", stride, dims, 1);
  check_setting("padding", padding, dims, 0);
  check_setting("dilation", dilation, dims, 1);
  STD_TORCH_CHECK(groups > 0 && x.size(1) % groups == 0 && grad.size(1) % groups == 0,
                  "groups: expected a divisor of both numbers of channels, got ", groups);
  Conv conv{x.size(0), groups,    x.size(1) / groups, grad.size(1) / groups, {1, 1, 1}, {1, 1, 1},
            {1, 1, 1}, {0, 0, 0}, {1, 1, 1}};
  Sizes shape{grad.size(1), conv.inputs};
  for (int64_t d = 0; d < dims; ++d) {
    const int64_t to = 3 - dims + d;
    shape.push_back(kernel[d]);
    conv.out[to] = grad.size(2 + d);
    conv.kernel[to] = kernel[d];
    conv.stride[to] = stride[d];
    conv.padding[to] = padding[d];
    conv.dilation[to] = dilation[d];
  }
  if (grad.numel() == 0 || x.numel() == 0) return zeros(x, shape);
  const Tensor result = fresh(x, shape);
  const bool by_channel = conv.inputs > 1;
  const Tensor g = in_lines(grad, by_channel), from = in_lines(x, by_channel);
  if (x.scalar_type() == ScalarType::Double)
    run<double>(conv, g, from, result);
  else
    run<float>(conv, g, from, result);
  return result;
}

}  // namespace torchbp

STABLE_TORCH_LIBRARY_IMPL(torchbp, CPU, m) {
  m.impl("conv_grad_weight", TORCH_BOX(&torchbp::conv_grad_weight_cpu));
}
