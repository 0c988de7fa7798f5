// Kernels for any processor, in plain vector code.
#define PG_NS generic
#define PG_ISA_NAME "generic"
#include "kernels.inc"

namespace pagoda {
const Kernels* kernels_generic() { return &generic::kTable; }
}  // namespace pagoda
