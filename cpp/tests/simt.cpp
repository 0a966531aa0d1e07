// The CUDA kernels with a C interface, run on the CPU; tests/kernels/test_cuda_source.py drives it.
// Launches repeat those of the .cu files, with the row blocks left to the caller.
#include "simt.h"

#include "cuda/blame_reduce.cuh"
#include "cuda/blame_settle.cuh"
#include "cuda/elementwise.cuh"
#include "cuda/softmax.cuh"

namespace torchbp {

template <class T, class F, int i = 0>
static void with_act(int act, const F& f) {
  if constexpr (i < act_count) {
    if (act == i)
      f(std::integral_constant<Act, Act(i)>{});
    else
      with_act<T, F, i + 1>(act, f);
  }
}
template <class T, class F, int i = 0>
static void with_fn(int function, const F& f) {
  if constexpr (i < fn_count) {
    if (function == i)
      f(std::integral_constant<Fn, Fn(i)>{});
    else
      with_fn<T, F, i + 1>(function, f);
  }
}
template <class F>
static void with_scalar(int dtype, const F& f) {
  if (dtype == 0) f(float{});
  if (dtype == 1) f(double{});
  if (dtype == 2) f(bf16{});
  if (dtype == 3) f(f16{});
}
static unsigned blocks_of(int64_t count, int64_t size) {
  return unsigned((count + size - 1) / size);
}

}  // namespace torchbp

using namespace torchbp;

extern "C" {

void simt_forward(int dtype, int act, const void* x, const void* bias, void* y, int64_t count,
                  int64_t channels, double alpha) {
  with_scalar(dtype, [&](auto scalar) {
    using T = decltype(scalar);
    with_act<T>(act, [&](auto a) {
      simt::launch({3, 1}, {64, 1}, forward_kernel<decltype(a)::value, T>, static_cast<const T*>(x),
                   static_cast<const T*>(bias), static_cast<T*>(y), count, channels,
                   acc_t<T>(alpha));
    });
  });
}

void simt_backward(int dtype, int act, const void* g, const void* x, void* grad, int64_t count,
                   double alpha) {
  with_scalar(dtype, [&](auto scalar) {
    using T = decltype(scalar);
    with_act<T>(act, [&](auto a) {
      simt::launch({3, 1}, {64, 1}, backward_kernel<decltype(a)::value, T>,
                   static_cast<const T*>(g), static_cast<const T*>(x), static_cast<T*>(grad), count,
                   acc_t<T>(alpha));
    });
  });
}

void simt_backward_bias(int dtype, int act, const void* g, const void* x, const void* bias,
                        void* grad, void* grad_bias, int64_t rows, int64_t channels,
                        int64_t block_rows, double alpha) {
  with_scalar(dtype, [&](auto scalar) {
    using T = decltype(scalar);
    const unsigned blocks = blocks_of(rows, block_rows);
    std::vector<acc_t<T>> sums(blocks * channels);
    with_act<T>(act, [&](auto a) {
      simt::launch({blocks_of(channels, lanes_x), blocks}, {lanes_x, lanes_y},
                   backward_bias_kernel<decltype(a)::value, T>, static_cast<const T*>(g),
                   static_cast<const T*>(x), static_cast<const T*>(bias), static_cast<T*>(grad),
                   rows, channels, block_rows, acc_t<T>(alpha), sums.data());
    });
    simt::launch({blocks_of(channels, 64), 1}, {64, 1}, join_kernel<T>,
                 static_cast<const acc_t<T>*>(sums.data()), static_cast<T*>(grad_bias),
                 int64_t(blocks), channels);
  });
}

void simt_elementwise(int dtype, int function, const void* g, const void* kept, void* grad,
                      int64_t count, double a, double b) {
  with_scalar(dtype, [&](auto scalar) {
    using T = decltype(scalar);
    with_fn<T>(function, [&](auto fn) {
      simt::launch({3, 1}, {64, 1}, tangent_kernel<decltype(fn)::value, T>,
                   static_cast<const T*>(g), static_cast<const T*>(kept), static_cast<T*>(grad),
                   count, acc_t<T>(a), acc_t<T>(b));
    });
  });
}

void simt_softmax(int dtype, bool logarithm, const void* g, const void* y, void* grad, int64_t rows,
                  int64_t width) {
  with_scalar(dtype, [&](auto scalar) {
    using T = decltype(scalar);
    simt::launch(
        {3, 1}, {softmax_lanes, 1}, logarithm ? softmax_kernel<true, T> : softmax_kernel<false, T>,
        static_cast<const T*>(g), static_cast<const T*>(y), static_cast<T*>(grad), rows, width);
  });
}

// strides: those of the activation as (sample, position, unit), then those of the error.
void simt_blame_reduce(int dtype, bool gradient, bool units_inner, const void* a, const void* delta,
                       void* contribution, void* stats, const int64_t* strides, int64_t samples,
                       int64_t positions, int64_t units, int64_t block_rows) {
  with_scalar(dtype, [&](auto scalar) {
    using T = decltype(scalar);
    using A = acc_t<T>;
    const unsigned blocks = blocks_of(samples, block_rows);
    const int64_t size = stat_count * units;
    std::vector<A> sums(blocks * size);
    const BlameArguments<T> q{static_cast<const T*>(a),
                              static_cast<const T*>(delta),
                              static_cast<A*>(contribution),
                              sums.data(),
                              {strides[0], strides[1], strides[2]},
                              {strides[3], strides[4], strides[5]},
                              samples,
                              positions,
                              units,
                              block_rows};
    const unsigned columns = units_inner ? blocks_of(units, lanes_x) : unsigned(units);
    const auto kernel =
        units_inner
            ? (gradient ? units_inner_kernel<true, T> : units_inner_kernel<false, T>)
            : (gradient ? positions_inner_kernel<true, T> : positions_inner_kernel<false, T>);
    simt::launch({columns, blocks}, {lanes_x, lanes_y}, kernel, q);
    simt::launch({blocks_of(size, 64), 1}, {64, 1}, join_kernel<A>,
                 static_cast<const A*>(sums.data()), static_cast<A*>(stats), int64_t(blocks), size);
  });
}

void simt_blame_settle(bool wide, int kind, const void* contribution, const void* losses,
                       const int64_t* labels, double scale, const int64_t* sizes, void* rows,
                       void* per_class, void* per_sample, int64_t samples, int64_t units,
                       int64_t n_classes, int64_t layers) {
  const auto settle = [&](auto scalar) {
    using T = decltype(scalar);
    std::vector<Sample<T>> shared(samples);
    simt::launch({blocks_of(samples, 64), 1}, {64, 1}, sample_kernel<T>,
                 static_cast<const T*>(losses), shared.data(), samples, BlameKind(kind));
    const SettleArguments<T> q{static_cast<const T*>(contribution),
                               shared.data(),
                               labels,
                               static_cast<T*>(rows),
                               static_cast<T*>(per_class),
                               static_cast<T*>(per_sample),
                               T(1 / scale),
                               samples,
                               units,
                               n_classes,
                               layers};
    simt::launch({blocks_of(units, lanes_x), 1}, {lanes_x, lanes_y}, columns_kernel<T>, q);
    each_layer_group(sizes, layers, [&](const LayerGroup& group, unsigned count) {
      simt::launch({blocks_of(samples, lanes_y), count}, {lanes_x, lanes_y}, layers_kernel<T>, q,
                   group);
    });
  };
  wide ? settle(double{}) : settle(float{});
}

void elementary_float(bool logarithm, const float* x, float* y, int64_t count) {
  for (int64_t i = 0; i < count; ++i) y[i] = logarithm ? log_one_plus(x[i]) : exp_minus_one(x[i]);
}
}
