// Vectors of 8 lanes and the few operations that differ between instruction sets; everything else is written once.
// Compiled once per instruction set: PG_NS names the namespace; PG_AVX2, PG_VNNI, PG_NEON, PG_DOTPROD say what may be used.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#define PG_INLINE static inline __attribute__((always_inline))
#if defined(PG_AVX2)
#include "vec_avx2.h"
#else
#include "vec_pairs.h"
#endif
#if defined(PG_VNNI)
#include "vec_vnni.h"
#endif

namespace pagoda {
namespace PG_NS {

// One panel of weights in a vector.
struct OnePanel {
  using F = PG_NS::F;
  using I = PG_NS::I;
  using B = PG_NS::B;
  static constexpr int panels = 1;
  PG_INLINE B load_bytes(const uint8_t* p, int64_t) { return PG_NS::load_bytes(p); }
  PG_INLINE F load_f16(const uint8_t* p, int64_t) { return PG_NS::load_f16((const uint16_t*)p); }
  PG_INLINE F load_u8(const uint8_t* p, int64_t) { return PG_NS::load_u8(p); }
  PG_INLINE F load_i8(const uint8_t* p, int64_t) { return PG_NS::load_i8(p); }
  PG_INLINE F load_power(const uint8_t* p, int64_t) { return PG_NS::load_power(p); }
  PG_INLINE F splat(float x) { return PG_NS::splat(x); }
  PG_INLINE I splat_i(int32_t x) { return PG_NS::splat_i(x); }
  PG_INLINE F panel(F v, int) { return v; }
};
#if !defined(PG_VNNI)
using Lanes = OnePanel;
#endif

PG_INLINE F abs(F v) { return max(v, -v); }

// e^x, for x up to 88: Cody-Waite reduction, degree-6 polynomial; relative error below 2e-7.
// Exactly 0 below -87.
PG_INLINE F exp(F input) {
  F x = min(max(input, splat(-87.0f)), splat(88.0f));
  F n = round(x * splat(1.44269504f));
  F r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);
  F p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r + splat(1.0f));
  I exponent = (to_int(n) + 127) << 23;
  return select(input < splat(-87.0f), F{}, p * bits_to_float(exponent));
}

}  // namespace PG_NS
}  // namespace pagoda
