// batch_norm.cu on the CPU, in grids that must stride; see simt.h. The weight is in the dtype of x,
// or, if `wide`, of sums.
#include "cuda/batch_norm.cuh"

using namespace torchbp;

extern "C" {

void backward(int64_t dtype, bool wide, bool inner, bool training, const void* g, const void* x,
              const void* mean, const void* rstd, const void* weight, void* grad, void* of_weight,
              void* of_bias, int64_t samples, int64_t channels, int64_t positions, int64_t groups,
              int64_t block_rows) {
  simt::with_scalar(dtype, [&](auto scalar) {
    using T = decltype(scalar);
    using A = acc_t<T>;
    const int64_t statistics = groups == 0 ? channels : samples * groups;
    BatchNormArguments<T> q{};
    q.grad_output = static_cast<const T*>(g);
    q.x = static_cast<const T*>(x);
    q.mean = static_cast<const A*>(mean);
    q.rstd = static_cast<const A*>(rstd);
    q.weight = static_cast<const T*>(wide ? nullptr : weight);
    q.wide_weight = static_cast<const A*>(wide ? weight : nullptr);
    q.grad_input = static_cast<T*>(grad);
    q.grad_weight = static_cast<A*>(of_weight);
    q.grad_bias = static_cast<A*>(of_bias);
    q.samples = inner && groups == 0 ? 1 : samples;
    q.channels = channels;
    q.positions = positions * (samples / q.samples);
    q.groups = groups;
    q.blocks = simt::blocks_of(q.positions, block_rows);
    q.block_rows = block_rows;
    q.channels_inner = inner;
    q.training = training;
    q.sums = simt::scratch<A>(q.samples * q.blocks * 2 * channels);
    q.slope = simt::scratch<A>(statistics);
    q.shift = simt::scratch<A>(statistics);
    const unsigned columns = inner ? simt::blocks_of(channels, lanes_x) : unsigned(channels);
    simt::launch({columns, 2}, {lanes_x, lanes_y}, plane_sums_kernel<T>, q);
    simt::launch({2}, {8}, statistic_kernel<T>, q);
    simt::launch({2}, {8}, parameter_kernel<T>, q);
    simt::launch({3}, {64}, channel_gradient_kernel<T>, q);
  });
}
}
