// gated.cu on the CPU; see simt.h.
#include "cuda/gated.cuh"

using namespace torchbp;

extern "C" {

void forward(int64_t dtype, int64_t act, const void* value, const void* gate, int64_t gate_begin,
             void* y, int64_t count, int64_t width, int64_t value_step, int64_t gate_step) {
  simt::with_scalar(dtype, [&](auto scalar) {
    using T = decltype(scalar);
    simt::with_enum<Act, act_count>(act, [&](auto a) {
      simt::launch({3}, {64}, gated_kernel<decltype(a)::value, T>, static_cast<const T*>(value),
                   static_cast<const T*>(gate) + gate_begin, static_cast<T*>(y), count, width,
                   value_step, gate_step);
    });
  });
}

void backward(int64_t dtype, int64_t act, const void* g, const void* value, const void* gate,
              int64_t gate_begin, void* of_value, void* of_gate, int64_t count, int64_t width,
              int64_t value_step, int64_t gate_step, int64_t grad_step) {
  simt::with_scalar(dtype, [&](auto scalar) {
    using T = decltype(scalar);
    simt::with_enum<Act, act_count>(act, [&](auto a) {
      simt::launch({3}, {64}, gated_backward_kernel<decltype(a)::value, T>,
                   static_cast<const T*>(g), static_cast<const T*>(value),
                   static_cast<const T*>(gate) + gate_begin, static_cast<T*>(of_value),
                   static_cast<T*>(of_gate) + gate_begin, count, width, value_step, gate_step,
                   grad_step);
    });
  });
}
}
