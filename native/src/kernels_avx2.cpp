// Kernels for AVX2 with FMA and F16C.
#define PG_NS avx2
#define PG_ISA_NAME "avx2"
#define PG_AVX2
#define PG_PACKED
#include "kernels.inc"

namespace pagoda {
const Kernels* kernels_avx2() { return &avx2::kTable; }
}  // namespace pagoda
