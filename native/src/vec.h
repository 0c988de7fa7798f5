// Vectors of 8 lanes and the few operations that differ between instruction sets; everything else is written once.
// Compiled once per instruction set: PG_NS names the namespace, PG_AVX2 / PG_VNNI say what may be used.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(PG_AVX2)
#include <immintrin.h>
#endif

namespace pagoda {
namespace PG_NS {

typedef float F __attribute__((vector_size(32), aligned(4)));
typedef int32_t I __attribute__((vector_size(32), aligned(4)));
typedef uint8_t B __attribute__((vector_size(32), aligned(1)));

#define PG_INLINE static inline __attribute__((always_inline))

PG_INLINE F load(const float* p) { return *reinterpret_cast<const F*>(p); }
PG_INLINE void store(float* p, F v) { *reinterpret_cast<F*>(p) = v; }
PG_INLINE B load_bytes(const uint8_t* p) { return *reinterpret_cast<const B*>(p); }
PG_INLINE F splat(float x) { return F{x, x, x, x, x, x, x, x}; }
PG_INLINE I splat_i(int32_t x) { return I{x, x, x, x, x, x, x, x}; }
PG_INLINE F to_float(I v) { return __builtin_convertvector(v, F); }

// Fixed order, so that a sum has the same bits wherever it is made.
PG_INLINE float sum_lanes(F v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }
PG_INLINE float max_lanes(F v) {
  float m = v[0];
  for (int i = 1; i < 8; i++) m = v[i] > m ? v[i] : m;
  return m;
}

#if defined(PG_AVX2)

PG_INLINE F fma(F a, F b, F c) { return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
PG_INLINE F max(F a, F b) { return (F)_mm256_max_ps((__m256)a, (__m256)b); }
PG_INLINE F min(F a, F b) { return (F)_mm256_min_ps((__m256)a, (__m256)b); }
PG_INLINE F load_f16(const uint16_t* p) { return (F)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
PG_INLINE void store_f16(uint16_t* p, F v) { _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, 0)); }
PG_INLINE F load_bf16(const uint16_t* p) {
  return (F)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
}
PG_INLINE F load_u8(const uint8_t* p) { return to_float((I)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p))); }
PG_INLINE F load_i8(const uint8_t* p) { return to_float((I)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p))); }
PG_INLINE F round(F v) { return (F)_mm256_round_ps((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
PG_INLINE I to_int(F v) { return (I)_mm256_cvtps_epi32((__m256)v); }
template <int N> PG_INLINE B shr(B v) { return (B)_mm256_srli_epi16((__m256i)v, N); }  // bits cross bytes: mask after
template <int N> PG_INLINE B shl(B v) { return (B)_mm256_slli_epi16((__m256i)v, N); }
PG_INLINE B look_up(const int8_t* table, B places) {  // of 16 entries; places 0 to 15
  return (B)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)table)), (__m256i)places);
}

#else

PG_INLINE F fma(F a, F b, F c) { return a * b + c; }
PG_INLINE F max(F a, F b) { return a > b ? a : b; }
PG_INLINE F min(F a, F b) { return a < b ? a : b; }
PG_INLINE float half_to_float(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, magnitude = h & 0x7fff, bits;
  if (magnitude >= 0x7c00) bits = 0x7f800000 | (magnitude & 0x3ff) << 13;
  else if (magnitude >= 0x400) bits = (magnitude << 13) + (112u << 23);
  else { float f = (float)magnitude * 0x1p-24f; memcpy(&bits, &f, 4); }
  bits |= sign;
  float f; memcpy(&f, &bits, 4);
  return f;
}
PG_INLINE uint16_t float_to_half(float f) {  // round to nearest even
  uint32_t x; memcpy(&x, &f, 4);
  uint32_t sign = (x >> 16) & 0x8000, a = x & 0x7fffffff;
  if (a > 0x7f800000) return sign | 0x7e00;
  if (a >= 0x47800000) return sign | 0x7c00;
  if (a < 0x38800000) {
    float m; memcpy(&m, &a, 4);
    return sign | (uint16_t)std::nearbyint(m * 0x1p24f);
  }
  a += 0xc8000fff + ((a >> 13) & 1);
  return sign | (a >> 13);
}
PG_INLINE F load_f16(const uint16_t* p) { F v; for (int i = 0; i < 8; i++) v[i] = half_to_float(p[i]); return v; }
PG_INLINE void store_f16(uint16_t* p, F v) { for (int i = 0; i < 8; i++) p[i] = float_to_half(v[i]); }
PG_INLINE F load_bf16(const uint16_t* p) {
  I v; for (int i = 0; i < 8; i++) v[i] = (int32_t)((uint32_t)p[i] << 16);
  return (F)v;
}
PG_INLINE F load_u8(const uint8_t* p) { F v; for (int i = 0; i < 8; i++) v[i] = p[i]; return v; }
PG_INLINE F load_i8(const uint8_t* p) { F v; for (int i = 0; i < 8; i++) v[i] = (int8_t)p[i]; return v; }
PG_INLINE F round(F v) { F r; for (int i = 0; i < 8; i++) r[i] = std::nearbyint(v[i]); return r; }
PG_INLINE I to_int(F v) { return __builtin_convertvector(round(v), I); }
template <int N> PG_INLINE B shr(B v) { return v >> N; }
template <int N> PG_INLINE B shl(B v) { return v << N; }
PG_INLINE B look_up(const int8_t* table, B places) {  // of 16 entries; places 0 to 15
  B v;
  for (int i = 0; i < 32; i++) v[i] = (uint8_t)table[places[i]];
  return v;
}

#endif

PG_INLINE F abs(F v) { return max(v, -v); }

// Sums of products of 4 consecutive bytes per lane. `Dot<P>` adds up codes (unsigned, from the weights) times
// activations (signed, 4 of them for all lanes); P is how many such steps fit into 16 bits on AVX2.
template <int P> struct Dot {
#if defined(PG_VNNI)
  I sum = {};
  template <int V> inline __attribute__((always_inline)) void add(B q, const int8_t* a) {
    int32_t four; memcpy(&four, a, 4);
    sum = (I)_mm256_dpbusd_epi32((__m256i)sum, (__m256i)q, _mm256_set1_epi32(four));
  }
#elif defined(PG_AVX2)
  I sum = {};
  __m256i part;
  template <int V> inline __attribute__((always_inline)) void add(B q, const int8_t* a) {
    int32_t four; memcpy(&four, a, 4);
    __m256i p = _mm256_maddubs_epi16((__m256i)q, _mm256_set1_epi32(four));
    part = V % P == 0 ? p : _mm256_add_epi16(part, p);
    if (V % P == P - 1) sum += (I)_mm256_madd_epi16(part, _mm256_set1_epi16(1));
  }
#else
  I sum = {};
  template <int V> inline __attribute__((always_inline)) void add(B q, const int8_t* a) {
    for (int lane = 0; lane < 8; lane++)
      for (int j = 0; j < 4; j++) sum[lane] += (int32_t)q[4 * lane + j] * a[j];
  }
#endif
};

// Signed 8-bit weights: with VNNI they are shifted to unsigned (the caller subtracts 128 times the activation sum),
// else their sign moves over to the activations.
#if defined(PG_VNNI)
constexpr int kSignedOffset = 128;
#else
constexpr int kSignedOffset = 0;
#endif
struct DotSigned {
  I sum = {};
  template <int V> inline __attribute__((always_inline)) void add(B q, const int8_t* a) {
#if defined(PG_VNNI)
    int32_t four; memcpy(&four, a, 4);
    sum = (I)_mm256_dpbusd_epi32((__m256i)sum, _mm256_xor_si256((__m256i)q, _mm256_set1_epi8(-128)), _mm256_set1_epi32(four));
#elif defined(PG_AVX2)
    int32_t four; memcpy(&four, a, 4);
    __m256i signs = _mm256_sign_epi8(_mm256_set1_epi32(four), (__m256i)q);
    __m256i p = _mm256_maddubs_epi16(_mm256_abs_epi8((__m256i)q), signs);
    sum += (I)_mm256_madd_epi16(p, _mm256_set1_epi16(1));
#else
    for (int lane = 0; lane < 8; lane++)
      for (int j = 0; j < 4; j++) sum[lane] += (int32_t)(int8_t)q[4 * lane + j] * a[j];
#endif
  }
};

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
  return input < splat(-87.0f) ? F{} : p * (F)exponent;
}

}  // namespace PG_NS
}  // namespace pagoda
