// Which instruction sets this machine can run.
#include "isa.h"

#include "same_product.h"
#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__)
#include <sys/auxv.h>
#endif

namespace pagoda {

#if defined(__x86_64__)
// The processor has tiles of bytes, the system saves them, and this process may use them: Linux gives the 8 KiB that their
// content takes in each thread only to who asks.
static bool may_use_amx() {
  constexpr int tiles = 1 << 24, int8 = 1 << 25, request_permission = 0x1023, tile_data = 18;
  constexpr uint32_t saved = 3u << 17;
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & tiles) == 0 || (d & int8) == 0) return false;
  uint32_t low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & saved) == saved && syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}
#endif

const Kernels* find_kernels(const std::string& isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool vnni = avx2 && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
  const bool bf16 = vnni && __builtin_cpu_supports("avx512bf16");
  if (isa == "amx") {
    static const bool works = bf16 && may_use_amx() && same_product(*kernels_amx(), *kernels_avx512());
    return works ? kernels_amx() : nullptr;
  }
  if (isa == "avx512-bf16") return bf16 ? kernels_bf16() : nullptr;
  if (isa == "avx512") return vnni ? kernels_avx512() : nullptr;
  if (isa == "avx2") return avx2 ? kernels_avx2() : nullptr;
#endif
#if defined(__aarch64__)
  if (isa == "neon-dotprod") return getauxval(AT_HWCAP) & HWCAP_ASIMDDP ? kernels_dotprod() : nullptr;
  if (isa == "neon") return kernels_neon();
#endif
  return isa == "generic" ? kernels_generic() : nullptr;
}

}  // namespace pagoda

using namespace pagoda;

extern "C" {

const char* pg_isa(int32_t i) {
  for (const char* isa : {"amx", "avx512-bf16", "avx512", "avx2", "neon-dotprod", "neon", "generic"})
    if (find_kernels(isa) && i-- == 0) return isa;
  return nullptr;
}

const char* pg_best_isa() { return pg_isa(0); }
}
