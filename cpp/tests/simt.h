// Runs CUDA kernels on the CPU: their own source, block by block, the threads of a block as fibers.
//
// How to test a kernel family `foo`:
//   cpp/tests/simt_foo.cpp   includes "cuda/foo.cuh" (the compiler is told to include this file
//     before all others); one function per entry in extern "C", which launches as the .cu file
//     does, but with
//       simt::launch(grid, block, kernel, arguments...)                  for <<<grid, block>>>
//       simt::launch_shared(grid, block, bytes, kernel, arguments...)    with dynamic shared memory
//       simt::scratch<T>(count)                                          for tensors of its own
//     and simt::with_scalar(dtype, f) for the four element types. Integers are int64_t, switches
//     bool, settings double, lists const int64_t*, tensors pointers.
//   tests/kernels/test_cuda_foo.py   `foo = simt.family("foo")` is a fixture; foo.entry(dtype, x,
//     None, 3, 0.5, [1, 2]) takes tensors, None, numbers, lists and dtypes, and runs the entry once
//     per seed: in order, and with blocks and threads shuffled (threads anew after every barrier).
//
// Device code has threadIdx, blockIdx, blockDim, gridDim (x, y, z), __shared__,
// TORCHBP_DYNAMIC_SHARED (cuda/device.h), __syncthreads, __syncwarp, __shfl_*_sync, __ballot_sync.
// Atomics do not link. A call fails where CUDA would be undefined:
//   races        two threads touch a byte, one of them writing, and no barrier orders them
//   memory       a byte of no tensor, scratch or shared array is touched
//   uninitialised  shared or scratch memory is read before it is written (it holds NaN, too)
//   barriers     some threads never come, or come to another one; a shuffle lacks a lane it names
// or where two seeds differ in one bit. Shuffles order no memory; __syncwarp does.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "torchbp/scalar.h"

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
// Blocks run one by one, so that one copy will do; being thread-local, the shared arrays of all
// kernels lie side by side, and the runtime finds them.
#define __shared__ static thread_local
#define TORCHBP_DYNAMIC_SHARED(T, name) T* const name = static_cast<T*>(simt::dynamic_shared())

namespace simt {

struct Index {
  unsigned x = 1, y = 1, z = 1;
};
inline constexpr unsigned warp_lanes = 32, full_mask = 0xffffffffu;

extern Index thread_index, block_index, block_size, grid_size;

// Where a barrier or a shuffle stands in the source.
struct Site {
  const char* file;
  int line;
  static Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

// One block after the other; `body` gets `arguments`, which are `size` bytes.
using Body = void (*)(const void* arguments);
void run(Body body, const void* arguments, size_t size, Index grid, Index block, size_t shared);
void* dynamic_shared();
void* scratch_bytes(size_t bytes);
void sync_threads(Site site);
void sync_warp(unsigned mask, Site site);
// Hands over `bits` and waits for all lanes in the mask.
void exchange(unsigned mask, uint64_t bits, Site site);
uint64_t value_of(unsigned lane, unsigned mask, Site site);  // what that lane handed over
unsigned lane_index();

template <class Kernel, class... Arguments>
void launch_shared(Index grid, Index block, size_t bytes, Kernel kernel, Arguments... arguments) {
  const auto call = [=] { kernel(arguments...); };
  const Body body = [](const void* at) { (*static_cast<decltype(&call)>(at))(); };
  run(body, &call, sizeof(call), grid, block, bytes);
}
template <class Kernel, class... Arguments>
void launch(Index grid, Index block, Kernel kernel, Arguments... arguments) {
  launch_shared(grid, block, 0, kernel, arguments...);
}

// Memory of the entry's own, undefined as that of torch.empty, for as long as the entry runs.
template <class T>
T* scratch(int64_t count) {
  return static_cast<T*>(scratch_bytes(size_t(count) * sizeof(T)));
}

// The blocks of `size` threads that cover `count` elements.
inline unsigned blocks_of(int64_t count, int64_t size) {
  return unsigned((count + size - 1) / size);
}

// Calls f with a value of the element type: numbers as in DTYPES of tests/kernels/simt.py.
template <class F>
void with_scalar(int64_t dtype, const F& f) {
  if (dtype == 0) f(float{});
  if (dtype == 1) f(double{});
  if (dtype == 2) f(torchbp::bf16{});
  if (dtype == 3) f(torchbp::f16{});
}

// Calls f with std::integral_constant<Enum, Enum(value)>, for enumerators 0 to count - 1.
template <class Enum, int count, int i = 0, class F>
void with_enum(int64_t value, const F& f) {
  if constexpr (i < count) {
    if (value == i)
      f(std::integral_constant<Enum, Enum(i)>{});
    else
      with_enum<Enum, count, i + 1>(value, f);
  }
}

enum class Move { down, up, exclusive, index };

template <class T>
T shuffle(Move move, unsigned mask, T value, int by, int width, Site site) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  exchange(mask, bits, site);
  const int lane = int(lane_index()), begin = lane / width * width, end = begin + width;
  int from = lane;
  if (move == Move::down) from = lane + by < end ? lane + by : lane;
  if (move == Move::up) from = lane - by >= begin ? lane - by : lane;
  if (move == Move::exclusive) from = (lane ^ by) < end ? lane ^ by : lane;
  if (move == Move::index) from = begin + by % width;
  bits = value_of(unsigned(from), mask, site);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace simt

#define threadIdx simt::thread_index
#define blockIdx simt::block_index
#define blockDim simt::block_size
#define gridDim simt::grid_size
#define warpSize int(simt::warp_lanes)

inline void __syncthreads(simt::Site site = simt::Site::here()) { simt::sync_threads(site); }
inline void __syncwarp(unsigned mask = simt::full_mask, simt::Site site = simt::Site::here()) {
  simt::sync_warp(mask, site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                   simt::Site site = simt::Site::here()) {
  return simt::shuffle(simt::Move::down, mask, value, int(delta), width, site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                 simt::Site site = simt::Site::here()) {
  return simt::shuffle(simt::Move::up, mask, value, int(delta), width, site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = warpSize,
                  simt::Site site = simt::Site::here()) {
  return simt::shuffle(simt::Move::exclusive, mask, value, lanes, width, site);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = warpSize,
              simt::Site site = simt::Site::here()) {
  return simt::shuffle(simt::Move::index, mask, value, lane, width, site);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, simt::Site site = simt::Site::here()) {
  simt::exchange(mask, predicate != 0, site);
  unsigned result = 0;
  for (unsigned lane = 0; lane < simt::warp_lanes; ++lane)
    if (mask >> lane & 1 && simt::value_of(lane, mask, site) != 0) result |= 1u << lane;
  return result;
}
