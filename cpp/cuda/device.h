// What device code needs of CUDA beyond the language; cpp/tests/simt.h has the host's version.
#pragma once
#if defined(__CUDACC__)
// Declares `T* name`, the dynamic shared memory of the launch, aligned to 16 bytes. Kernels that
// are instantiated for several T share one symbol, which CUDA wants declared alike everywhere.
#define TORCHBP_DYNAMIC_SHARED(T, name)                           \
  extern __shared__ __align__(16) unsigned char torchbp_shared[]; \
  T* const name = reinterpret_cast<T*>(torchbp_shared)
#endif
