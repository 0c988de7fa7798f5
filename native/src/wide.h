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
