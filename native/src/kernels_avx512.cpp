// Kernels for AVX-512 with VNNI, on 256-bit vectors: the byte products in one instruction.
#define PG_NS avx512
#define PG_ISA_NAME "avx512"
#define PG_AVX2
#define PG_VNNI
#include "kernels.inc"

namespace pagoda {
const Kernels* kernels_avx512() { return &avx512::kTable; }
}  // namespace pagoda
