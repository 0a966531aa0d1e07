// elementwise.cu on the CPU; see simt.h.
#include "cuda/elementwise.cuh"

using namespace torchbp;

extern "C" {

void backward(int64_t dtype, int64_t function, const void* g, const void* kept, void* grad,
              int64_t count, double a, double b) {
  simt::with_scalar(dtype, [&](auto scalar) {
    using T = decltype(scalar);
    simt::with_enum<Fn, fn_count>(function, [&](auto fn) {
      simt::launch({3}, {64}, tangent_kernel<decltype(fn)::value, T>, static_cast<const T*>(g),
                   static_cast<const T*>(kept), static_cast<T*>(grad), count, acc_t<T>(a),
                   acc_t<T>(b));
    });
  });
}

// The elementary functions themselves, which the host and the device share.
void elementary_float(bool logarithm, const float* x, float* y, int64_t count) {
  for (int64_t i = 0; i < count; ++i) y[i] = logarithm ? log_one_plus(x[i]) : exp_minus_one(x[i]);
}
}
