// Vectors of 16 lanes, as many as a cache block has tokens: one of 512 bits, or a pair of those of 8 lanes.
#pragma once
#include "vec.h"

namespace pagoda {
namespace PG_NS {

#if defined(PG_VNNI)
using W = F16;
PG_INLINE W load_wide(const float* p) { return *reinterpret_cast<const W*>(p); }
PG_INLINE void store_wide(float* p, W v) { *reinterpret_cast<W*>(p) = v; }
PG_INLINE W splat_wide(float x) { return (W)_mm512_set1_ps(x); }
PG_INLINE W load_wide_f16(const uint16_t* p) { return (W)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
PG_INLINE W load_wide_i8(const uint8_t* p) { return to_float((I16)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p))); }
// The registers of a W: one.
constexpr int kParts = 1;
using Part16 = W;
PG_INLINE W& part(W& w, int) { return w; }
PG_INLINE W load_part_f16(const uint16_t* p, int) { return load_wide_f16(p); }
PG_INLINE W load_part_i8(const uint8_t* p, int) { return load_wide_i8(p); }
PG_INLINE W splat_part(float x) { return splat_wide(x); }
#else
struct W {
  F low, high;
};
// The registers of a W: two, that a loop need not hold at the same time.
constexpr int kParts = 2;
using Part16 = F;
PG_INLINE F& part(W& w, int i) { return i ? w.high : w.low; }
PG_INLINE F load_part_f16(const uint16_t* p, int i) { return load_f16(p + 8 * i); }
PG_INLINE F load_part_i8(const uint8_t* p, int i) { return load_i8(p + 8 * i); }
PG_INLINE F splat_part(float x) { return splat(x); }
PG_INLINE W load_wide(const float* p) { return {load(p), load(p + 8)}; }
PG_INLINE void store_wide(float* p, W v) { store(p, v.low), store(p + 8, v.high); }
PG_INLINE W splat_wide(float x) { return {splat(x), splat(x)}; }
PG_INLINE W load_wide_f16(const uint16_t* p) { return {load_f16(p), load_f16(p + 8)}; }
PG_INLINE W load_wide_i8(const uint8_t* p) { return {load_i8(p), load_i8(p + 8)}; }
PG_INLINE W operator*(W a, W b) { return {a.low * b.low, a.high * b.high}; }
PG_INLINE W fma(W a, W b, W c) { return {fma(a.low, b.low, c.low), fma(a.high, b.high, c.high)}; }
#endif

// The 16 bits in which a cache is kept: f16 in a register each, or bf16 by pairs, which one instruction multiplies and adds.
// A pair for all lanes lies in the bits of a float, where `to_halves` or `exponents` has put it. `to` may be `x`.
#if defined(PG_PAIRS)
constexpr int kHalves = 2;
using Pairs = __m512bh;
PG_INLINE W fma(Pairs a, Pairs b, W c) { return (W)_mm512_dpbf16_ps((__m512)c, a, b); }
PG_INLINE Pairs load_halves(const uint16_t* p, int) { return (Pairs)_mm512_loadu_si512(p); }
PG_INLINE Pairs splat_halves(float x) { return (Pairs)_mm512_set1_ps(x); }
// 16 floats in whose bits such pairs lie.
PG_INLINE Pairs load_slots(const float* p) { return (Pairs)_mm512_loadu_ps(p); }
PG_INLINE Pairs splat_slots(float x) { return splat_halves(x); }
// Of two rows the pairs of what lies one above the other; `below` null: of 0.
PG_INLINE void pair_rows(const float* above, const float* below, int n, float* to) {
  for (int i = 0; i < n; i += 8) {
    const __m128i low = (__m128i)_mm256_cvtneps_pbh((__m256)load(above + i));
    const __m128i high = below ? (__m128i)_mm256_cvtneps_pbh((__m256)load(below + i)) : _mm_setzero_si128();
    _mm256_storeu_si256((__m256i*)(to + i), _mm256_or_si256(_mm256_cvtepu16_epi32(low), _mm256_slli_epi32(_mm256_cvtepu16_epi32(high), 16)));
  }
}
PG_INLINE Pairs first_half(Pairs v) { return (Pairs)_mm512_and_si512((__m512i)v, _mm512_set1_epi32(0xffff)); }
PG_INLINE void store_halves(const float* x, int64_t n, uint16_t* to) {
  for (int64_t i = 0; i < n; i += 8) _mm_storeu_si128((__m128i*)(to + i), (__m128i)_mm256_cvtneps_pbh((__m256)load(x + i)));
}
PG_INLINE void to_halves(const float* x, int n, float* to) { store_halves(x, n, (uint16_t*)to); }

// to = e^(x - top), n of them, a multiple of 16, to some 5e-6; returns their sum. Below 2^-150 it is 0. A NaN stays one.
PG_INLINE float exponents(const float* x, int n, float top, float* to) {
  constexpr float log2_e = 1.44269504f;
  W sum = {};
  for (int i = 0; i < n; i += 16) {
    const W y = fma(load_wide(x + i), splat_wide(log2_e), splat_wide(-top * log2_e));
    const __m512 z = _mm512_max_ps(_mm512_set1_ps(-160.0f), (__m512)y);
    const __m512 whole = _mm512_roundscale_ps(z, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const W r = (W)_mm512_sub_ps(z, whole);
    W p = splat_wide(0.00957010221f);
    p = fma(p, r, splat_wide(0.0559178628f));
    p = fma(p, r, splat_wide(0.240247443f));
    p = fma(p, r, splat_wide(0.693121791f));
    p = fma(p, r, splat_wide(0.999999285f));
    const __m512 e = _mm512_scalef_ps((__m512)p, whole);
    sum += (W)e;
    _mm256_storeu_si256((__m256i*)(to + i / 2), (__m256i)_mm512_cvtneps_pbh(e));
  }
  return sum_lanes((F)_mm512_castps512_ps256((__m512)sum) + (F)_mm512_extractf32x8_ps((__m512)sum, 1));
}
#else
constexpr int kHalves = 1;
PG_INLINE Part16 load_halves(const uint16_t* p, int i) { return load_part_f16(p, i); }
PG_INLINE Part16 splat_halves(float x) { return splat_part(x); }
PG_INLINE W load_slots(const float* p) { return load_wide(p); }
PG_INLINE W splat_slots(float x) { return splat_wide(x); }
PG_INLINE void pair_rows(const float* above, const float*, int n, float* to) { memcpy(to, above, n * sizeof(float)); }
PG_INLINE void store_halves(const float* x, int n, uint16_t* to) {
  for (int i = 0; i < n; i += 8) store_f16(to + i, load(x + i));
}
PG_INLINE void to_halves(const float*, int, float*) {}

PG_INLINE float exponents(const float* x, int n, float top, float* to) {
  F sum = {};
  for (int i = 0; i < n; i += 8) {
    const F e = exp(load(x + i) - top);
    sum += e;
    store(to + i, e);
  }
  return sum_lanes(sum);
}
#endif
PG_INLINE Part16 first_half(Part16 v) { return v; }

// Registers decide how much is worked on at once: queries, blocks of keys for n queries, columns of 16 values for them.
#if defined(PG_VNNI)
constexpr int kQueriesAtOnce = 8;
constexpr int keys_at_once(int n) { return n <= 2 ? 4 : 2; }
constexpr int columns_at_once(int n) { return n <= 4 ? 4 : 2; }
#elif defined(PG_AVX2)
constexpr int kQueriesAtOnce = 6;
constexpr int keys_at_once(int n) { return n == 1 ? 4 : n <= 3 ? 2 : 1; }
constexpr int columns_at_once(int n) { return n == 1 ? 4 : n <= 3 ? 2 : 1; }
#else
constexpr int kQueriesAtOnce = 4;
constexpr int keys_at_once(int n) { return n == 1 ? 2 : 1; }
constexpr int columns_at_once(int n) { return n == 1 ? 2 : 1; }
#endif

}  // namespace PG_NS
}  // namespace pagoda
