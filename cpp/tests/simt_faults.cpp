// Kernels with one fault each, and what they should have been: tests/kernels/test_simt.py shows
// that simt.h finds the faults, and nothing else.
#include "cuda/device.h"

namespace {

enum Fault {
  none,
  missing_barrier,
  overwritten_early,
  missing_last,
  uninitialised,
  uninitialised_scratch,
  divergent_shuffle,
  shuffle_of_an_early_end,
  two_shuffles,
  partial_mask,
  divergent_barrier,
  barrier_after_end,
  past_the_end,
  before_the_start,
  past_dynamic_shared,
  blocks_share_a_cell,
  block_reads_anothers_result,
  shuffle_is_no_barrier,
};

constexpr unsigned lanes = 64;

// out[i] = the sum of x over the block of i, but for the thread itself; the rest of x repeats.
template <int fault>
__global__ void sums_kernel(const float* x, float* out, int64_t count) {
  __shared__ float cells[lanes];
  TORCHBP_DYNAMIC_SHARED(float, warp_sums);
  for (int64_t first = blockIdx.x * int64_t(lanes); first < count;
       first += int64_t(gridDim.x) * lanes) {
    const int64_t i = first + threadIdx.x;
    const float value =
        i < count ? x[i + (fault == past_the_end) - (fault == before_the_start)] : 0;
    if (fault != uninitialised || threadIdx.x != 5) cells[threadIdx.x] = value;
    if (fault != missing_barrier) __syncthreads();
    float sum = cells[lanes - 1 - threadIdx.x];
    if (fault == overwritten_early) cells[threadIdx.x] = 0;
    if (fault == divergent_barrier && threadIdx.x < 32)
      __syncthreads();
    else
      __syncthreads();
    if (fault == shuffle_of_an_early_end && i >= count) return;
    if (fault != divergent_shuffle || threadIdx.x % 2 == 0)
      for (int step = 16; step > 0; step /= 2)
        sum += __shfl_down_sync(fault == partial_mask ? 0xffffu : simt::full_mask, sum, step);
    if (fault == two_shuffles) {
      if (threadIdx.x % 2 == 0)
        sum += __shfl_xor_sync(simt::full_mask, sum, 1);
      else
        sum -= __shfl_xor_sync(simt::full_mask, sum, 1);
    }
    if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32 + (fault == past_dynamic_shared)] = sum;
    if (fault == barrier_after_end && i >= count) return;
    __syncthreads();
    sum = warp_sums[0] + warp_sums[1];
    __syncthreads();
    if (i + (fault == missing_last) < count) out[i] = sum - value;
  }
}

template <int fault>
__global__ void blocks_kernel(float* out, const float* undefined) {
  if (fault == uninitialised_scratch) out[blockIdx.x] = undefined[blockIdx.x];
  if (fault == blocks_share_a_cell && threadIdx.x == 0) out[0] = 1;
  if (fault == block_reads_anothers_result && threadIdx.x == 0)
    out[blockIdx.x] = blockIdx.x == 0 ? 0 : out[blockIdx.x - 1];
}

// A warp reverses its values by shared memory.
template <int fault>
__global__ void warp_kernel(float* x) {
  __shared__ float cells[32];
  cells[threadIdx.x] = x[threadIdx.x];
  if (fault == shuffle_is_no_barrier)
    __shfl_sync(simt::full_mask, 1, 0);
  else
    __syncwarp();
  x[threadIdx.x] = cells[31 - threadIdx.x];
}

}  // namespace

extern "C" {

void sums(int64_t fault, const float* x, float* out, int64_t count) {
  simt::with_enum<Fault, shuffle_is_no_barrier + 1>(fault, [&](auto f) {
    constexpr int chosen = decltype(f)::value;
    simt::launch_shared({2}, {lanes}, 2 * sizeof(float), sums_kernel<chosen>, x, out, count);
  });
}

void blocks(int64_t fault, float* out) {
  const float* const undefined = simt::scratch<float>(3);
  simt::with_enum<Fault, shuffle_is_no_barrier + 1>(fault, [&](auto f) {
    simt::launch({3}, {4}, blocks_kernel<decltype(f)::value>, out, undefined);
  });
}

void reverse(int64_t fault, float* x) {
  simt::with_enum<Fault, shuffle_is_no_barrier + 1>(
      fault, [&](auto f) { simt::launch({1}, {32}, warp_kernel<decltype(f)::value>, x); });
}
}
