// Kernels for NEON as every 64-bit ARM processor has it.
#define PG_NS neon
#define PG_ISA_NAME "neon"
#define PG_NEON
#include "kernels.inc"

namespace pagoda {
const Kernels* kernels_neon() { return &neon::kTable; }
}  // namespace pagoda
