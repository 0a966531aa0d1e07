// blame_reduce.cu on the CPU; see simt.h. The row blocks of sums are left to the caller.
#include "cuda/blame_reduce.cuh"

using namespace torchbp;

extern "C" {

// strides: those of the activation as (sample, position, unit), then those of the error.
void reduce(int64_t dtype, bool gradient, bool units_inner, const void* a, const void* delta,
            void* contribution, void* stats, const int64_t* strides, int64_t samples,
            int64_t positions, int64_t units, int64_t block_rows) {
  simt::with_scalar(dtype, [&](auto scalar) {
    using T = decltype(scalar);
    using A = acc_t<T>;
    const unsigned blocks = simt::blocks_of(samples, block_rows);
    const int64_t size = stat_count * units;
    A* const sums = simt::scratch<A>(blocks * size);
    const BlameArguments<T> q{static_cast<const T*>(a),
                              static_cast<const T*>(delta),
                              static_cast<A*>(contribution),
                              sums,
                              {strides[0], strides[1], strides[2]},
                              {strides[3], strides[4], strides[5]},
                              samples,
                              positions,
                              units,
                              block_rows};
    const unsigned columns = units_inner ? simt::blocks_of(units, lanes_x) : unsigned(units);
    const auto kernel =
        units_inner
            ? (gradient ? units_inner_kernel<true, T> : units_inner_kernel<false, T>)
            : (gradient ? positions_inner_kernel<true, T> : positions_inner_kernel<false, T>);
    simt::launch({columns, blocks}, {lanes_x, lanes_y}, kernel, q);
    simt::launch({simt::blocks_of(size, 64)}, {64}, join_kernel<A>, static_cast<const A*>(sums),
                 static_cast<A*>(stats), int64_t(blocks), size);
  });
}
}
