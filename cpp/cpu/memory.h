// Memory for results.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "torchbp/tensor.h"

namespace torchbp {

// Asks for huge pages under a large tensor that is about to be written. The allocator takes such
// memory from the system anew and hands it back every time, so that a first pass over it would wait
// for a page fault every 4 KiB; one every 2 MiB costs next to nothing. It is a hint: where the
// system takes none, nothing changes.
inline const Tensor& in_huge_pages(const Tensor& t) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 4096, least = 8 << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(t.const_data_ptr());
  const uintptr_t size = uintptr_t(t.numel()) * t.element_size();
  if (size >= least) {
    const uintptr_t first = (begin + page - 1) / page * page;
    madvise(reinterpret_cast<void*>(first), (begin + size - first) / page * page, MADV_HUGEPAGE);
  }
#endif
  return t;
}

inline void clear(const Tensor& t) {
  if (t.numel() > 0) std::memset(t.mutable_data_ptr(), 0, t.numel() * t.element_size());
}
inline Tensor zeros(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                    std::optional<ScalarType> dtype = std::nullopt) {
  const Tensor t = fresh(like, sizes, dtype);
  clear(t);
  return t;
}

}  // namespace torchbp
