// The Python module torchbp._C and the op schemas. Importing it runs the registrations of every
// file of the extension; the Python side adds the reference kernels, fake and vmap rules.
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include "cpu/isa.h"

#define TORCHBP_TEXT_(x) #x
#define TORCHBP_TEXT(x) TORCHBP_TEXT_(x)

#if defined(TORCHBP_WITH_CUDA)
static constexpr int with_cuda = 1;
#else
static constexpr int with_cuda = 0;
#endif

PyMODINIT_FUNC PyInit__C(void) {
  static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                                          "_C",
                                          "Compiled kernels of torchbp.",
                                          -1,
                                          nullptr,
                                          nullptr,
                                          nullptr,
                                          nullptr,
                                          nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (module == nullptr || PyModule_AddStringConstant(module, "isa", torchbp::isa_name()) != 0 ||
      PyModule_AddIntConstant(module, "with_cuda", with_cuda) != 0 ||
      PyModule_AddStringConstant(module, "built_with", TORCHBP_TEXT(TORCHBP_BUILT_WITH)) != 0) {
    Py_XDECREF(module);
    return nullptr;
  }
  return module;
}

// torchbp/kernels/registration.py repeats these for the case that there is no extension.
STABLE_TORCH_LIBRARY(torchbp, m) {
  m.def(
      "batch_norm_backward(Tensor grad_output, Tensor x, Tensor mean, Tensor rstd, Tensor? weight,"
      " bool training) -> (Tensor, Tensor, Tensor)");
  m.def("bias_act(Tensor x, Tensor? bias, str act, float alpha) -> Tensor");
  m.def(
      "bias_act_backward(Tensor grad_output, Tensor x, Tensor? bias, str act, float alpha)"
      " -> (Tensor, Tensor)");
  m.def(
      "blame_reduce(Tensor activation, Tensor error, int unit_dim, bool gradient)"
      " -> (Tensor, Tensor)");
  m.def(
      "blame_reduce_into(Tensor activation, Tensor error, int unit_dim, bool gradient,"
      " Tensor(a!) contribution, Tensor(b!) stats) -> ()");
  m.def(
      "blame_settle(Tensor[] contributions, Tensor[] stats, Tensor losses, Tensor? labels,"
      " int n_classes, float scale, int[] kinds) -> (Tensor, Tensor, Tensor)");
  m.def(
      "conv_grad_weight(Tensor grad_output, Tensor x, int[] kernel, int[] stride, int[] padding,"
      " int[] dilation, int groups) -> Tensor");
  m.def(
      "elementwise_backward(Tensor grad_output, Tensor kept, int function, float a, float b)"
      " -> Tensor");
  m.def("softmax_backward(Tensor grad_output, Tensor output, bool logarithm) -> Tensor");
  m.def(
      "layer_norm_backward(Tensor grad_output, Tensor x, Tensor? mean, Tensor rstd, Tensor? weight,"
      " int dims) -> (Tensor, Tensor, Tensor)");
}
