// add_norm.cu on the CPU; see simt.h. A parameter is in the dtype of x, or, if `wide`, of sums.
#include "cuda/add_norm.cuh"
#include "cuda/bias_act.cuh"

using namespace torchbp;

extern "C" {

void forward(int64_t dtype, bool wide, const void* x, const void* residual, const void* mask,
             double p, const void* weight, const void* bias, double eps, void* y, void* sum,
             void* mean, void* rstd, int64_t rows, int64_t columns) {
  simt::with_scalar(dtype, [&](auto scalar) {
    using T = decltype(scalar);
    using A = acc_t<T>;
    const AddNormArguments<T> q{static_cast<const T*>(x),
                                static_cast<const T*>(residual),
                                static_cast<const uint8_t*>(mask),
                                static_cast<const T*>(wide ? nullptr : weight),
                                static_cast<const T*>(wide ? nullptr : bias),
                                static_cast<const A*>(wide ? weight : nullptr),
                                static_cast<const A*>(wide ? bias : nullptr),
                                static_cast<T*>(y),
                                static_cast<T*>(sum),
                                static_cast<A*>(mean),
                                static_cast<A*>(rstd),
                                dropout_noise<T>(p),
                                eps,
                                rows,
                                columns};
    simt::launch({3}, {softmax_lanes}, add_norm_kernel<T>, q);
  });
}

void backward(int64_t dtype, bool wide, const void* g, const void* grad_sum, const void* x,
              const void* mask, double p, const void* mean, const void* rstd, const void* weight,
              void* grad, void* branch, void* of_parameters, int64_t rows, int64_t columns,
              int64_t block_rows) {
  simt::with_scalar(dtype, [&](auto scalar) {
    using T = decltype(scalar);
    using A = acc_t<T>;
    const unsigned blocks = simt::blocks_of(rows, block_rows) + 1;  // the last one without a row
    A* sums = simt::scratch<A>(blocks * 2 * columns);
    const NormBackwardArguments<T> q{static_cast<const T*>(g),
                                     static_cast<const T*>(grad_sum),
                                     static_cast<const T*>(x),
                                     static_cast<const uint8_t*>(mask),
                                     static_cast<const A*>(mean),
                                     static_cast<const A*>(rstd),
                                     static_cast<const T*>(wide ? nullptr : weight),
                                     static_cast<const A*>(wide ? weight : nullptr),
                                     static_cast<T*>(grad),
                                     static_cast<T*>(branch),
                                     sums,
                                     dropout_noise<T>(p),
                                     rows,
                                     columns,
                                     block_rows};
    simt::launch({blocks}, {softmax_lanes}, norm_backward_kernel<T>, q);
    simt::launch({2}, {64}, join_kernel<A>, static_cast<const A*>(sums),
                 static_cast<A*>(of_parameters), int64_t(blocks), 2 * columns);
  });
}
}
