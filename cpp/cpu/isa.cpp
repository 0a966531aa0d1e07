#include "cpu/isa.h"

#include <cstdlib>
#include <cstring>

namespace torchbp {

static Isa detect() {
#if defined(TORCHBP_X86_LOOPS)
  const char* wanted = std::getenv("TORCHBP_CPU_CAPABILITY");
  const auto at_most = [wanted](const char* name) {
    return wanted != nullptr && std::strcmp(wanted, name) == 0;
  };
  __builtin_cpu_init();
  if (at_most("base") || !__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma"))
    return Isa::base;
  if (at_most("avx2") || !__builtin_cpu_supports("avx512f") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq"))
    return Isa::avx2;
  return Isa::avx512;
#else
  return Isa::base;
#endif
}

Isa isa() {
  static const Isa value = detect();
  return value;
}

const char* isa_name() {
  constexpr const char* names[] = {"base", "avx2", "avx512"};
  return names[static_cast<int>(isa())];
}

}  // namespace torchbp
