// Vectors of 8 lanes as pairs of 128-bit vectors: plain vector code for any processor, with NEON's own instructions where
// they are better. A compiler keeps such pairs in registers; its own 256-bit vectors it would keep in memory.
// PG_NEON / PG_DOTPROD say what may be used.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(PG_NEON)
#include <arm_neon.h>
#endif

namespace pagoda {
namespace PG_NS {

typedef float F4 __attribute__((vector_size(16)));
typedef int32_t I4 __attribute__((vector_size(16)));
typedef int16_t S8 __attribute__((vector_size(16)));
typedef uint8_t B16 __attribute__((vector_size(16)));
typedef uint16_t U4 __attribute__((vector_size(8)));

template <typename V> struct Pair {
  V low, high;
  using Lane = typename std::remove_reference<decltype(V{}[0])>::type;
  inline __attribute__((always_inline)) Lane operator[](int i) const {
    constexpr int n = sizeof(V) / sizeof(Lane);
    return i < n ? low[i] : high[i - n];
  }
};
using F = Pair<F4>;
using I = Pair<I4>;
using B = Pair<B16>;

template <typename V> PG_INLINE Pair<V> pair(V low, V high) { return {low, high}; }

#define PG_OPERATOR(op)                                                                                             \
  template <typename V> PG_INLINE auto operator op(Pair<V> a, Pair<V> b) {                                          \
    return pair(a.low op b.low, a.high op b.high);                                                                  \
  }                                                                                                                 \
  template <typename V> PG_INLINE auto operator op(Pair<V> a, typename Pair<V>::Lane b) {                           \
    return pair(a.low op b, a.high op b);                                                                           \
  }
PG_OPERATOR(+) PG_OPERATOR(-) PG_OPERATOR(*) PG_OPERATOR(/) PG_OPERATOR(&) PG_OPERATOR(|) PG_OPERATOR(^)
PG_OPERATOR(<<) PG_OPERATOR(>>) PG_OPERATOR(<) PG_OPERATOR(>) PG_OPERATOR(==)
#undef PG_OPERATOR
template <typename V> PG_INLINE Pair<V> operator-(Pair<V> a) { return {-a.low, -a.high}; }
template <typename V> PG_INLINE Pair<V>& operator+=(Pair<V>& a, Pair<V> b) { return a = a + b; }

PG_INLINE F select(I mask, F a, F b) { return {mask.low ? a.low : b.low, mask.high ? a.high : b.high}; }
PG_INLINE F splat(float x) { F4 v = {x, x, x, x}; return {v, v}; }
PG_INLINE I splat_i(int32_t x) { I4 v = {x, x, x, x}; return {v, v}; }
PG_INLINE F to_float(I v) { return {__builtin_convertvector(v.low, F4), __builtin_convertvector(v.high, F4)}; }
PG_INLINE F bits_to_float(I v) { return {(F4)v.low, (F4)v.high}; }
PG_INLINE I float_to_bits(F v) { return {(I4)v.low, (I4)v.high}; }
// Half by half: a copy of the whole would go through memory.
template <typename V> PG_INLINE V load_half(const void* p) { V v; memcpy(&v, p, sizeof v); return v; }
PG_INLINE F load(const float* p) { return {load_half<F4>(p), load_half<F4>(p + 4)}; }
PG_INLINE void store(float* p, F v) { memcpy(p, &v.low, sizeof v.low), memcpy(p + 4, &v.high, sizeof v.high); }
PG_INLINE B load_bytes(const uint8_t* p) { return {load_half<B16>(p), load_half<B16>(p + 16)}; }
PG_INLINE I load_u16(const uint16_t* p) {
  return {__builtin_convertvector(load_half<U4>(p), I4), __builtin_convertvector(load_half<U4>(p + 4), I4)};
}
// The lower or the upper of each pair of values.
PG_INLINE F load_bf16(const uint16_t* p, bool upper) {
  const I both = {load_half<I4>(p), load_half<I4>(p + 8)};
  return bits_to_float(upper ? both & INT32_C(-65536) : both << 16);
}
PG_INLINE F load_u8(const uint8_t* p) { I4 a = {p[0], p[1], p[2], p[3]}, b = {p[4], p[5], p[6], p[7]}; return to_float(pair(a, b)); }
PG_INLINE F load_i8(const uint8_t* p) {
  typedef int8_t C4 __attribute__((vector_size(4)));
  return {__builtin_convertvector(load_half<C4>(p), F4), __builtin_convertvector(load_half<C4>(p + 4), F4)};
}
// Powers of two, by their exponents in a float; 0 is 0.
PG_INLINE F load_power(const uint8_t* p) {
  typedef uint8_t C4 __attribute__((vector_size(4)));
  return bits_to_float(pair(__builtin_convertvector(load_half<C4>(p), I4), __builtin_convertvector(load_half<C4>(p + 4), I4)) << 23);
}
PG_INLINE F max(F a, F b) { return select(a > b, a, b); }
PG_INLINE F min(F a, F b) { return select(a < b, a, b); }
// To the nearest even, for |v| < 2^22: in front of this constant no bit is left for a fraction.
PG_INLINE F round(F v) { return (v + 0x1.8p23f) - 0x1.8p23f; }
PG_INLINE I to_int(F v) {
  F r = round(v);
  return {__builtin_convertvector(r.low, I4), __builtin_convertvector(r.high, I4)};
}
// Fixed order, so that a sum has the same bits wherever it is made.
PG_INLINE float sum_lanes(F v) {
  const F4 s = v.low + v.high;
  return (s[0] + s[2]) + (s[1] + s[3]);
}
PG_INLINE float max_lanes(F v) {
  const F4 m = v.low > v.high ? v.low : v.high;
  const float a = m[0] > m[2] ? m[0] : m[2], b = m[1] > m[3] ? m[1] : m[3];
  return a > b ? a : b;
}
PG_INLINE int32_t sum_lanes(I v) {
  const I4 s = v.low + v.high;
  return (s[0] + s[2]) + (s[1] + s[3]);
}
// 32 integers within -127 .. 127 as bytes, one behind the other.
PG_INLINE void store_i8(int8_t* p, const I (&v)[4]) {
  typedef int8_t C4 __attribute__((vector_size(4)));
  for (int i = 0; i < 4; i++, p += 8) {
    const C4 low = __builtin_convertvector(v[i].low, C4), high = __builtin_convertvector(v[i].high, C4);
    memcpy(p, &low, sizeof low), memcpy(p + 4, &high, sizeof high);
  }
}
template <int N> PG_INLINE B shr(B v) { return v >> N; }
template <int N> PG_INLINE B shl(B v) { return v << N; }

#if defined(PG_NEON)

PG_INLINE F fma(F a, F b, F c) {
  return {(F4)vfmaq_f32((float32x4_t)c.low, (float32x4_t)a.low, (float32x4_t)b.low),
          (F4)vfmaq_f32((float32x4_t)c.high, (float32x4_t)a.high, (float32x4_t)b.high)};
}
PG_INLINE F load_f16(const uint16_t* p) {
  float16x8_t h = vreinterpretq_f16_u16(vld1q_u16(p));
  return {(F4)vcvt_f32_f16(vget_low_f16(h)), (F4)vcvt_high_f32_f16(h)};
}
PG_INLINE void store_f16(uint16_t* p, F v) {
  float16x4_t low = vcvt_f16_f32((float32x4_t)v.low);
  vst1q_u16(p, vreinterpretq_u16_f16(vcvt_high_f16_f32(low, (float32x4_t)v.high)));
}
PG_INLINE B look_up(const int8_t* table, B places) {  // of 16 entries; places 0 to 15
  uint8x16_t t = vreinterpretq_u8_s8(vld1q_s8(table));
  return {(B16)vqtbl1q_u8(t, (uint8x16_t)places.low), (B16)vqtbl1q_u8(t, (uint8x16_t)places.high)};
}

#else

PG_INLINE F fma(F a, F b, F c) { return a * b + c; }
// The 15 bits behind the sign, as the same bits of a float32, are 2^112 too small; infinity and NaN keep their exponent.
PG_INLINE F load_f16(const uint16_t* p) {
  I h = load_u16(p), magnitude = (h & 0x7fff) << 13;
  I bits = float_to_bits(bits_to_float(magnitude) * 0x1p112f) | (h & 0x8000) << 16;
  return bits_to_float(bits | ((magnitude > splat_i(0x0f7fffff)) & 0x7f800000));
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
PG_INLINE void store_f16(uint16_t* p, F v) { for (int i = 0; i < 8; i++) p[i] = float_to_half(v[i]); }
PG_INLINE B look_up(const int8_t* table, B places) {  // of 16 entries; places 0 to 15
  uint8_t bytes[32];
  for (int i = 0; i < 32; i++) bytes[i] = (uint8_t)table[places[i]];
  return load_bytes(bytes);
}

#endif

// `Dot<P>` adds up, in each 32-bit lane, the products of its 4 codes (at most 127, or signed) and 4 activations, which
// all lanes share; P is how many steps fit into 16 bits, two products in each.
#if defined(PG_DOTPROD)
template <int P> struct Dot {
  I sum;
  int8x16_t shared;  // of four steps
  template <int V> inline __attribute__((always_inline)) void add(B q, const int8_t* a) {
    if constexpr (V % 4 == 0) shared = vld1q_s8(a);
    sum.low = (I4)vdotq_laneq_s32((int32x4_t)sum.low, (int8x16_t)q.low, shared, V % 4);
    sum.high = (I4)vdotq_laneq_s32((int32x4_t)sum.high, (int8x16_t)q.high, shared, V % 4);
  }
};
#elif defined(PG_NEON)
template <int P> struct Dot {
  I sum;
  int16x8_t part[4];
  template <int V> inline __attribute__((always_inline)) void add(B q, const int8_t* a) {
    int32_t four; memcpy(&four, a, 4);
    const int8x16_t shared = vreinterpretq_s8_s32(vdupq_n_s32(four));
    step<V>((int8x16_t)q.low, shared, part, sum.low), step<V>((int8x16_t)q.high, shared, part + 2, sum.high);
  }
  template <int V> static inline __attribute__((always_inline)) void step(int8x16_t q, int8x16_t a, int16x8_t* to, I4& total) {
    if constexpr (V % P == 0) {
      to[0] = vmull_s8(vget_low_s8(q), vget_low_s8(a)), to[1] = vmull_high_s8(q, a);
    } else {
      to[0] = vmlal_s8(to[0], vget_low_s8(q), vget_low_s8(a)), to[1] = vmlal_high_s8(to[1], q, a);
    }
    if constexpr (V % P == P - 1) total = (I4)vpadalq_s16((int32x4_t)total, vpaddq_s16(to[0], to[1]));
  }
};
#else
template <int P> struct Dot {
  I sum;
  Pair<S8> part;
  template <int V> inline __attribute__((always_inline)) void add(B q, const int8_t* a) {
    int32_t four; memcpy(&four, a, 4);
    const S8 shared = (S8)I4{four, four, four, four}, even = shared << 8 >> 8, odd = shared >> 8;
    const S8 low = (S8)q.low, high = (S8)q.high;
    const Pair<S8> p = {(low << 8 >> 8) * even + (low >> 8) * odd, (high << 8 >> 8) * even + (high >> 8) * odd};
    part = V % P == 0 ? p : part + p;
    if constexpr (V % P == P - 1) {
      const I both = {(I4)part.low, (I4)part.high};
      sum += (both << 16 >> 16) + (both >> 16);
    }
  }
};
#endif
using DotSigned = Dot<1>;
constexpr int kSignedOffset = 0;

}  // namespace PG_NS
}  // namespace pagoda
