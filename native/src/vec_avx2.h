// Vectors of 8 lanes in AVX2 with FMA and F16C. The products of bytes are not used where there is VNNI.
#pragma once
#include <cstdint>
#include <cstring>
#include <immintrin.h>

namespace pagoda {
namespace PG_NS {

typedef float F __attribute__((vector_size(32), aligned(4)));
typedef int32_t I __attribute__((vector_size(32), aligned(4)));
typedef uint8_t B __attribute__((vector_size(32), aligned(1)));

PG_INLINE F load(const float* p) { return *reinterpret_cast<const F*>(p); }
PG_INLINE void store(float* p, F v) { *reinterpret_cast<F*>(p) = v; }
PG_INLINE B load_bytes(const uint8_t* p) { return *reinterpret_cast<const B*>(p); }
PG_INLINE F splat(float x) { return F{x, x, x, x, x, x, x, x}; }
PG_INLINE I splat_i(int32_t x) { return I{x, x, x, x, x, x, x, x}; }
PG_INLINE F to_float(I v) { return __builtin_convertvector(v, F); }

PG_INLINE F fma(F a, F b, F c) { return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
PG_INLINE F select(I mask, F a, F b) { return mask ? a : b; }
PG_INLINE F bits_to_float(I v) { return (F)v; }
PG_INLINE F max(F a, F b) { return (F)_mm256_max_ps((__m256)a, (__m256)b); }
PG_INLINE F min(F a, F b) { return (F)_mm256_min_ps((__m256)a, (__m256)b); }
PG_INLINE F load_f16(const uint16_t* p) { return (F)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
PG_INLINE void store_f16(uint16_t* p, F v) { _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, 0)); }
// The lower or the upper of each pair of values.
PG_INLINE F load_bf16(const uint16_t* p, bool upper) {
  const I both = *reinterpret_cast<const I*>(p);
  return (F)(upper ? both & INT32_C(-65536) : both << 16);
}
PG_INLINE F load_u8(const uint8_t* p) { return to_float((I)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p))); }
PG_INLINE F load_i8(const uint8_t* p) { return to_float((I)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p))); }
// Powers of two, by their exponents in a float; 0 is 0.
PG_INLINE F load_power(const uint8_t* p) {
  return (F)_mm256_slli_epi32(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)), 23);
}
PG_INLINE F round(F v) { return (F)_mm256_round_ps((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
PG_INLINE I to_int(F v) { return (I)_mm256_cvtps_epi32((__m256)v); }
// Fixed order, so that a sum has the same bits wherever it is made.
PG_INLINE float sum_lanes(F v) {
  const __m128 s = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  const __m128 pair = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
}
PG_INLINE float max_lanes(F v) {
  const __m128 m = _mm_max_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  const __m128 pair = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(pair, _mm_movehdup_ps(pair)));
}
PG_INLINE int32_t sum_lanes(I v) {
  const __m128i s = _mm_add_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
  const __m128i pair = _mm_add_epi32(s, _mm_unpackhi_epi64(s, s));
  return _mm_cvtsi128_si32(_mm_add_epi32(pair, _mm_shuffle_epi32(pair, 1)));
}
// 32 integers within -127 .. 127 as bytes, one behind the other.
PG_INLINE void store_i8(int8_t* p, const I (&v)[4]) {
  const __m256i low = _mm256_packs_epi32((__m256i)v[0], (__m256i)v[1]), high = _mm256_packs_epi32((__m256i)v[2], (__m256i)v[3]);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // packing goes by halves of a vector
  _mm256_storeu_si256((__m256i*)p, _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order));
}
template <int N> PG_INLINE B shr(B v) { return (B)_mm256_srli_epi16((__m256i)v, N); }  // bits cross bytes: mask after
template <int N> PG_INLINE B shl(B v) { return (B)_mm256_slli_epi16((__m256i)v, N); }
PG_INLINE B look_up(const int8_t* table, B places) {  // of 16 entries; places 0 to 15
  return (B)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)table)), (__m256i)places);
}

#if !defined(PG_VNNI)
// Sums of products of 4 consecutive bytes per lane. `Dot<P>` adds up codes (unsigned, from the weights) times
// activations (signed, 4 of them for all lanes); P is how many such steps fit into 16 bits.
PG_INLINE __m256i shared_bytes(const void* four) {
  int32_t x; memcpy(&x, four, 4);
  return _mm256_set1_epi32(x);
}
template <int P> struct Dot {
  I sum;
  __m256i part;
  template <int V> inline __attribute__((always_inline)) void step(B q, __m256i a) {
    __m256i p = _mm256_maddubs_epi16((__m256i)q, a);
    part = V % P == 0 ? p : _mm256_add_epi16(part, p);
    if (V % P == P - 1) sum += (I)_mm256_madd_epi16(part, _mm256_set1_epi16(1));
  }
  template <int V> inline __attribute__((always_inline)) void add(B q, const int8_t* a) { step<V>(q, shared_bytes(a)); }
};

// Signed 8-bit weights: their sign moves over to the activations.
constexpr int kSignedOffset = 0;
struct DotSigned {
  I sum;
  template <int V> inline __attribute__((always_inline)) void add(B q, const int8_t* a) {
    int32_t four; memcpy(&four, a, 4);
    __m256i signs = _mm256_sign_epi8(_mm256_set1_epi32(four), (__m256i)q);
    __m256i p = _mm256_maddubs_epi16(_mm256_abs_epi8((__m256i)q), signs);
    sum += (I)_mm256_madd_epi16(p, _mm256_set1_epi16(1));
  }
};
// Signed weights times activations, both in 16 bits: less work, where weights are widened once for many rows.
struct DotWide {
  I sum;
  template <int V> inline __attribute__((always_inline)) void step(B q, __m256i a) { sum += (I)_mm256_madd_epi16((__m256i)q, a); }
};
PG_INLINE void store_bytes(void* p, B v) { *reinterpret_cast<B*>(p) = v; }
PG_INLINE B even_bytes(B v) { return (B)_mm256_srai_epi16(_mm256_slli_epi16((__m256i)v, 8), 8); }  // in 16 bits
PG_INLINE B odd_bytes(B v) { return (B)_mm256_srai_epi16((__m256i)v, 8); }
#endif

}  // namespace PG_NS
}  // namespace pagoda
