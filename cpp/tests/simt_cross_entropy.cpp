// cross_entropy.cu on the CPU; see simt.h.
#include "cuda/cross_entropy.cuh"

using namespace torchbp;

extern "C" {

// sums: two float64 numbers; grad and to may be null, as may both.
void rows(int64_t dtype, const void* logits, const void* weight, const int64_t* target,
          const void* grad, double* sums, void* to, void* both, int64_t count, int64_t classes,
          int64_t ignore_index, double smoothing, double z_loss, bool by_row, bool mean) {
  simt::with_scalar(dtype, [&](auto scalar) {
    using T = decltype(scalar);
    using A = acc_t<T>;
    const T *z = static_cast<const T*>(logits), *w = static_cast<const T*>(weight);
    simt::launch({1}, {loss_threads}, loss_weights_kernel<T>, w, target, count, classes,
                 ignore_index, sums);
    const LossArguments<T> p{z,
                             w,
                             target,
                             static_cast<const A*>(grad),
                             sums,
                             static_cast<T*>(to),
                             static_cast<A*>(both),
                             count,
                             {classes, ignore_index, smoothing, z_loss, 0},
                             by_row,
                             mean};
    if (count > 0) simt::launch({3}, {loss_threads}, loss_kernel<T>, p);
  });
}

void reduce(int64_t dtype, const void* losses, const double* sums, void* loss, int64_t count,
            bool by_row, bool mean) {
  simt::with_scalar(dtype, [&](auto scalar) {
    using T = decltype(scalar);
    const auto* from = static_cast<const acc_t<T>*>(losses);
    T* to = static_cast<T*>(loss);
    const unsigned blocks = unsigned((count + loss_threads - 1) / loss_threads);
    if (!by_row)
      simt::launch({1}, {loss_threads}, loss_sum_kernel<T>, from, count, sums, mean, to);
    else if (count > 0)
      simt::launch({blocks}, {loss_threads}, loss_cast_kernel<T>, from, count, to);
  });
}
}
