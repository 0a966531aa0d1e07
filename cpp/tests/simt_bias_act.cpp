// bias_act.cu on the CPU; see simt.h. The row blocks of sums are left to the caller.
#include "cuda/bias_act.cuh"

using namespace torchbp;

template <class F>
static void with_kind(int64_t dtype, int64_t act, const F& f) {
  simt::with_scalar(dtype, [&](auto scalar) {
    simt::with_enum<Act, act_count>(act, [&](auto a) { f(scalar, a); });
  });
}

extern "C" {

void forward(int64_t dtype, int64_t act, const void* x, const void* bias, void* y, int64_t count,
             int64_t channels, double alpha) {
  with_kind(dtype, act, [&](auto scalar, auto a) {
    using T = decltype(scalar);
    simt::launch({3}, {64}, forward_kernel<decltype(a)::value, T>, static_cast<const T*>(x),
                 static_cast<const T*>(bias), static_cast<T*>(y), count, channels, acc_t<T>(alpha));
  });
}

void backward(int64_t dtype, int64_t act, const void* g, const void* x, void* grad, int64_t count,
              double alpha) {
  with_kind(dtype, act, [&](auto scalar, auto a) {
    using T = decltype(scalar);
    simt::launch({3}, {64}, backward_kernel<decltype(a)::value, T>, static_cast<const T*>(g),
                 static_cast<const T*>(x), static_cast<T*>(grad), count, acc_t<T>(alpha));
  });
}

void backward_bias(int64_t dtype, int64_t act, const void* g, const void* x, const void* bias,
                   void* grad, void* grad_bias, int64_t rows, int64_t channels, int64_t block_rows,
                   double alpha) {
  with_kind(dtype, act, [&](auto scalar, auto a) {
    using T = decltype(scalar);
    const unsigned blocks = simt::blocks_of(rows, block_rows);
    acc_t<T>* const sums = simt::scratch<acc_t<T>>(blocks * channels);
    simt::launch({simt::blocks_of(channels, lanes_x), blocks}, {lanes_x, lanes_y},
                 backward_bias_kernel<decltype(a)::value, T>, static_cast<const T*>(g),
                 static_cast<const T*>(x), static_cast<const T*>(bias), static_cast<T*>(grad), rows,
                 channels, block_rows, acc_t<T>(alpha), sums);
    simt::launch({simt::blocks_of(channels, 64)}, {64}, join_kernel<T>,
                 static_cast<const acc_t<T>*>(sums), static_cast<T*>(grad_bias), int64_t(blocks),
                 channels);
  });
}
}
