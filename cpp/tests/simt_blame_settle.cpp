// blame_settle.cu on the CPU; see simt.h.
#include "cuda/blame_settle.cuh"

using namespace torchbp;

template <class T>
static void run(BlameKind kind, const T* losses, const int64_t* sizes, SettleArguments<T> q) {
  Sample<T>* const shared = simt::scratch<Sample<T>>(q.samples);
  simt::launch({2}, {64}, sample_kernel<T>, losses, shared, q.samples, kind);
  q.shared = shared;
  simt::launch({simt::blocks_of(q.units, lanes_x)}, {lanes_x, lanes_y}, columns_kernel<T>, q);
  each_layer_group(sizes, q.layers, [&](const LayerGroup& group, unsigned count) {
    simt::launch({simt::blocks_of(q.samples, lanes_y), count}, {lanes_x, lanes_y}, layers_kernel<T>,
                 q, group);
  });
}

extern "C" {

void settle(bool wide, int64_t kind, const void* contribution, const void* stats,
            const void* losses, const int64_t* labels, double scale, const int64_t* sizes,
            void* rows, void* per_class, void* per_sample, int64_t samples, int64_t units,
            int64_t n_classes, int64_t layers) {
  const auto as = [&](auto scalar) {
    using T = decltype(scalar);
    run<T>(BlameKind(kind), static_cast<const T*>(losses), sizes,
           {static_cast<const T*>(contribution), nullptr, labels, static_cast<T*>(rows),
            static_cast<T*>(per_class), static_cast<T*>(per_sample), T(1 / scale), samples, units,
            n_classes, layers, units, static_cast<const T*>(stats)});
  };
  wide ? as(double{}) : as(float{});
}
}
