// Kernels for AMX: quantized products of many rows in tiles of 8-bit integers, the rest as for AVX-512 with BF16.
#define PG_NS amx
#define PG_AVX2
#define PG_VNNI
#include "amx.h"

namespace pagoda {

const Kernels* kernels_amx() {
  static const Kernels table = [] {
    Kernels t = *kernels_bf16();
    t.name = "amx", t.matmul = amx::matmul;
    return t;
  }();
  return &table;
}

}  // namespace pagoda
