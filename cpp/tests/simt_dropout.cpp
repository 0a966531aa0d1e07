// dropout.cu on the CPU; see simt.h.
#include "cuda/dropout.cuh"

using namespace torchbp;

extern "C" {

void bits(bool wide, const void* kept, uint8_t* packed, int64_t count) {
  if (wide)
    simt::launch({3}, {64}, dropout_bits_kernel<int32_t>, static_cast<const int32_t*>(kept), packed,
                 count);
  else
    simt::launch({3}, {64}, dropout_bits_kernel<uint8_t>, static_cast<const uint8_t*>(kept), packed,
                 count);
}

void apply(int64_t dtype, const void* x, const uint8_t* packed, void* y, int64_t count,
           double scale) {
  simt::with_scalar(dtype, [&](auto scalar) {
    using T = decltype(scalar);
    simt::launch({3}, {64}, dropout_apply_kernel<T>, static_cast<const T*>(x), packed,
                 static_cast<T*>(y), count, acc_t<T>(scale));
  });
}
}
