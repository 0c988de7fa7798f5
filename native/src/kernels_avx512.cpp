// Kernels for AVX-512 with VNNI: quantized products on 512-bit vectors, the rest on 256.
#define PG_NS avx512
#define PG_ISA_NAME "avx512"
#define PG_AVX2
#define PG_VNNI
#include "kernels.inc"

namespace pagoda {
const Kernels* kernels_avx512() { return &avx512::kTable; }
}  // namespace pagoda
