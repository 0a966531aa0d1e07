// New tensors that are large enough for their first writing to cost more than the kernel.
#pragma once
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "torchbp/tensor.h"

namespace torchbp {

// Asks for huge pages under a tensor nobody has written to. Blocks above 32 MiB, malloc's largest
// mmap threshold, are mapped anew for every tensor, and the page faults of the first writing take
// several times as long as the writing. Only whole pages inside the tensor are asked for, so that
// it takes no more memory; where the system refuses, nothing changes.
inline void ask_for_huge_pages(const Tensor& t) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uint64_t page = uint64_t(1) << 21, least = uint64_t(32) << 20;
  const uint64_t bytes = uint64_t(t.numel()) * uint64_t(t.element_size());
  if (bytes <= least) return;
  const uint64_t begin = reinterpret_cast<uint64_t>(t.mutable_data_ptr());
  const uint64_t first = (begin + page - 1) / page * page, last = (begin + bytes) / page * page;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace torchbp
