// Kernels for NEON with the dot products of ARMv8.2: four byte products for each lane in one instruction.
#define PG_NS neon_dotprod
#define PG_ISA_NAME "neon-dotprod"
#define PG_NEON
#define PG_DOTPROD
#include "kernels.inc"

namespace pagoda {
const Kernels* kernels_dotprod() { return &neon_dotprod::kTable; }
}  // namespace pagoda
