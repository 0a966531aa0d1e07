// max_pool.cu on the CPU; see simt.h.
#include "cuda/max_pool.cuh"

using namespace torchbp;

// `numbers`: samples, channels, then in, out, kernel, stride, padding and dilation.
static Pool pool(const int64_t* numbers) {
  Pool q{numbers[0], numbers[1], {}, {}, {}, {}, {}, {}};
  int64_t* parts[] = {q.in, q.out, q.kernel, q.stride, q.padding, q.dilation};
  for (int i = 0; i < 18; ++i) parts[i / 3][i % 3] = numbers[2 + i];
  return q;
}
static Placement placement(const int64_t* strides, bool channels_inner) {
  return {strides[0], strides[1], {strides[2], strides[3], strides[4]}, channels_inner};
}

extern "C" {

void forward(int64_t dtype, bool inner, const int64_t* numbers, const void* x, const int64_t* of_x,
             void* y, uint8_t* offsets, const int64_t* of_y, int64_t count) {
  simt::with_scalar(dtype, [&](auto scalar) {
    using T = decltype(scalar);
    simt::launch({3}, {64}, max_pool_kernel<T, uint8_t>, pool(numbers), static_cast<const T*>(x),
                 placement(of_x, inner), static_cast<T*>(y), offsets, placement(of_y, inner),
                 count);
  });
}

void backward(int64_t dtype, bool inner, const int64_t* numbers, const void* g, const int64_t* of_g,
              const uint8_t* offsets, const int64_t* of_offsets, void* grad, const int64_t* of_grad,
              int64_t count) {
  simt::with_scalar(dtype, [&](auto scalar) {
    using T = decltype(scalar);
    simt::launch({3}, {64}, max_pool_backward_kernel<T, uint8_t>, pool(numbers),
                 static_cast<const T*>(g), placement(of_g, inner), offsets,
                 placement(of_offsets, inner), static_cast<T*>(grad), placement(of_grad, inner),
                 count);
  });
}
}
