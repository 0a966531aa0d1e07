// What every .cu file needs to start a kernel.
#pragma once
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>

#include "torchbp/tensor.h"

namespace torchbp {

inline cudaStream_t current_stream(const Tensor& t) {
  const auto stream = torch::stable::accelerator::getCurrentStream(t.get_device_index());
  return static_cast<cudaStream_t>(stream.nativeHandle());
}

inline void check_launch(const char* op) {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, op, ": ", cudaGetErrorString(error));
}

// Blocks of 256 threads for a loop that strides over the grid.
inline unsigned flat_blocks(int64_t count) {
  return unsigned(std::min<int64_t>(ceil_div(count, 256), 1 << 20));
}

// As many blocks as a grid may have along y: a loop must stride over more.
inline constexpr int64_t most_grid_y = 65535;

// Row blocks of a reduction: by the shape alone, so that sums do not depend on the device.
struct RowBlocks {
  int64_t blocks, rows;
  RowBlocks(int64_t total_rows, int64_t elements) {
    blocks = std::clamp<int64_t>(elements >> 14, 1, std::min<int64_t>(128, total_rows));
    rows = ceil_div(total_rows, blocks);
  }
};

}  // namespace torchbp
