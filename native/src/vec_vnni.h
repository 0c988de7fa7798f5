// Products of bytes in AVX-512 with VNNI: two panels of weights in a vector of 512 bits.
#pragma once
#include <cstdint>
#include <cstring>
#include <immintrin.h>

namespace pagoda {
namespace PG_NS {

typedef float F16 __attribute__((vector_size(64), aligned(4)));
typedef int32_t I16 __attribute__((vector_size(64), aligned(4)));
typedef uint8_t B64 __attribute__((vector_size(64), aligned(1)));

PG_INLINE F16 fma(F16 a, F16 b, F16 c) { return (F16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
PG_INLINE F16 to_float(I16 v) { return __builtin_convertvector(v, F16); }
template <int N> PG_INLINE B64 shr(B64 v) { return (B64)_mm512_srli_epi16((__m512i)v, N); }
template <int N> PG_INLINE B64 shl(B64 v) { return (B64)_mm512_slli_epi16((__m512i)v, N); }
PG_INLINE B64 look_up(const int8_t* table, B64 places) {
  return (B64)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)table)), (__m512i)places);
}

// What quantized products compute with, see OnePanel: here a pair of panels, `stride` bytes from each other.
struct Lanes {
  using F = F16;
  using I = I16;
  using B = B64;
  static constexpr int panels = 2;
  PG_INLINE F both(PG_NS::F a, PG_NS::F b) {
    return (F)_mm512_insertf32x8(_mm512_castps256_ps512((__m256)a), (__m256)b, 1);
  }
  PG_INLINE B load_bytes(const uint8_t* p, int64_t stride) {
    const __m256i high = _mm256_loadu_si256((const __m256i*)(p + stride));
    return (B)_mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)p)), high, 1);
  }
  PG_INLINE F load_f16(const uint8_t* p, int64_t stride) {
    const __m128i high = _mm_loadu_si128((const __m128i*)(p + stride));
    return (F)_mm512_cvtph_ps(_mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)p)), high, 1));
  }
  PG_INLINE F load_u8(const uint8_t* p, int64_t stride) { return both(PG_NS::load_u8(p), PG_NS::load_u8(p + stride)); }
  PG_INLINE F load_i8(const uint8_t* p, int64_t stride) { return both(PG_NS::load_i8(p), PG_NS::load_i8(p + stride)); }
  PG_INLINE F load_power(const uint8_t* p, int64_t stride) { return both(PG_NS::load_power(p), PG_NS::load_power(p + stride)); }
  PG_INLINE F splat(float x) { return (F)_mm512_set1_ps(x); }
  PG_INLINE I splat_i(int32_t x) { return (I)_mm512_set1_epi32(x); }
  PG_INLINE PG_NS::F panel(F v, int i) {
    return (PG_NS::F)(i ? _mm512_extractf32x8_ps((__m512)v, 1) : _mm512_castps512_ps256((__m512)v));
  }
};

// Sums of products of 4 consecutive bytes per lane. `Dot<P>` adds up codes (unsigned, from the weights) times
// activations (signed, 4 of them for all lanes).
template <int P> struct Dot {
  I16 sum;
  template <int V> inline __attribute__((always_inline)) void add(B64 q, const int8_t* a) {
    int32_t four; memcpy(&four, a, 4);
    sum = (I16)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)q, _mm512_set1_epi32(four));
  }
};

// Signed weights become unsigned by an offset; the sum begins with the activations' sum times minus the offset.
constexpr int kSignedOffset = 128;
struct DotSigned : Dot<8> {
  template <int V> inline __attribute__((always_inline)) void add(B64 q, const int8_t* a) {
    Dot<8>::add<V>((B64)_mm512_xor_si512((__m512i)q, _mm512_set1_epi8(-128)), a);
  }
};

}  // namespace PG_NS
}  // namespace pagoda
