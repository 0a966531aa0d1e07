// The instruction sets that loops are compiled for, and the one picked for this process.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define TORCHBP_X86_LOOPS 1
#endif

namespace torchbp {

enum class Isa { base, avx2, avx512 };

// The best that the processor has; the environment variable TORCHBP_CPU_CAPABILITY lowers it.
Isa isa();
const char* isa_name();

// Bytes of a vector register of an instruction set, and how many of them there are.
struct Registers {
  int bytes, count;
};
namespace base {
constexpr Registers registers{16, 16};
}
namespace avx2 {
constexpr Registers registers{32, 16};
}
namespace avx512 {
constexpr Registers registers{64, 32};
}

}  // namespace torchbp

// The instance of a loop, `name` in the namespaces base, avx2 and avx512, that suits the processor.
#if defined(TORCHBP_X86_LOOPS)
#define TORCHBP_PICK(...)                                           \
  (::torchbp::isa() == ::torchbp::Isa::avx512 ? avx512::__VA_ARGS__ \
   : ::torchbp::isa() == ::torchbp::Isa::avx2 ? avx2::__VA_ARGS__   \
                                              : base::__VA_ARGS__)
#else
#define TORCHBP_PICK(...) (base::__VA_ARGS__)
#endif
