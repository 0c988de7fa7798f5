// What every product needs to know about a panel: its codes, scales and minima by type, and where its results go.
#pragma once
#include <type_traits>
#include <utility>

#include "kernels.h"
#include "vec.h"

namespace pagoda {
namespace PG_NS {

template <int N, typename Body, int... V> PG_INLINE void unroll(Body&& body, std::integer_sequence<int, V...>) {
  (body(std::integral_constant<int, V>{}), ...);
}
template <int N, typename Body> PG_INLINE void unroll(Body&& body) {
  unroll<N>(std::forward<Body>(body), std::make_integer_sequence<int, N>{});
}

constexpr bool is_five_bit(int t) { return t == PG_Q5_0 || t == PG_Q5_1 || t == PG_Q5_K; }
constexpr bool has_halves(int t) { return t == PG_Q6_K || t == PG_Q2_K || t == PG_Q3_K; }  // a scale for each 16
constexpr int plane_bytes(int t) {
  return t == PG_Q8_0 || t == PG_U8G ? 256 : t == PG_Q2_K ? 64 : t == PG_Q3_K ? 96 : is_five_bit(t) ? 160 : t == PG_Q6_K ? 192 : 128;
}
// Steps that 16-bit sums hold: 2 * step * largest code * 127 must stay below 32768.
constexpr int period(int t) { return t == PG_Q6_K ? 2 : is_five_bit(t) || has_halves(t) || t == PG_MXFP4 ? 4 : 8; }

template <int N, typename B> PG_INLINE B down(B v, uint8_t mask) {
  B m = B{} + mask;
  if constexpr (N > 0) return shr<N>(v) & m;
  else if constexpr (N < 0) return shl<-N>(v) & m;
  else return v & m;
}

alignas(16) constexpr int8_t kIq4Values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
// The 4-bit floats 0 .. 6 and -0 .. -6, times two, plus an offset that makes them unsigned: that is faster than signs.
constexpr int kMxfp4Offset = 12;
alignas(16) constexpr int8_t kMxfp4Codes[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

// Vector V of the codes of the block at p, and of the one behind it if L holds two panels.
template <typename L, int Type, int V> PG_INLINE typename L::B codes(const uint8_t* p) {
  using B = typename L::B;
  constexpr int stride = layout_of(Type).block;
  if constexpr (Type == PG_Q8_0 || Type == PG_U8G) return L::load_bytes(p + 32 * V, stride);
  else if constexpr (Type == PG_Q2_K || Type == PG_Q3_K) {
    B low = down<2 * (V % 4)>(L::load_bytes(p + 32 * (V / 4), stride), 3);
    if constexpr (Type == PG_Q3_K) return low | down<V - 2>(L::load_bytes(p + 64, stride), 4);
    return low;
  } else {
    B low = down<4 * (V % 2)>(L::load_bytes(p + 32 * (V / 2), stride), 15);
    if constexpr (is_iq4(Type)) return look_up(kIq4Values, low);
    if constexpr (Type == PG_MXFP4) return look_up(kMxfp4Codes, low);
    if constexpr (is_five_bit(Type)) return low | down<V - 4>(L::load_bytes(p + 128, stride), 16);
    if constexpr (Type == PG_Q6_K) return low | down<2 * (V % 4) - 4>(L::load_bytes(p + 128 + 32 * (V / 4), stride), 48);
    return low;
  }
}

// value = d * (code - kOffset) + m for the rows of a block (or of its half G).
template <int Type> constexpr int offset_of() {
  switch (Type) {
    case PG_Q4_0: return 8;
    case PG_Q5_0: return 16;
    case PG_Q6_K: return 32;
    case PG_Q3_K: return 4;
    case PG_MXFP4: return kMxfp4Offset;
    default: return is_signed(Type) ? kSignedOffset : 0;
  }
}
template <int Type> constexpr bool has_min() {
  return Type == PG_Q4_1 || Type == PG_Q5_1 || Type == PG_Q4_K || Type == PG_Q5_K || Type == PG_Q2_K || Type == PG_U4G || Type == PG_U8G;
}
template <typename F> struct Scales {
  F d, m;
};
template <typename L, int Type, int G>
PG_INLINE Scales<typename L::F> scales(const uint8_t* block, const uint8_t* header) {
  using F = typename L::F;
  constexpr Layout layout = layout_of(Type);
  const uint8_t* p = block + plane_bytes(Type);
  const auto head = [=](int at) __attribute__((always_inline)) { return L::load_f16(header + at, layout.header); };
  const auto f16 = [=](int at) __attribute__((always_inline)) { return L::load_f16(p + at, layout.block); };
  const auto u8 = [=](int at) __attribute__((always_inline)) { return L::load_u8(p + at, layout.block); };
  const auto i8 = [=](int at) __attribute__((always_inline)) { return L::load_i8(p + at, layout.block); };
  if constexpr (Type == PG_Q4_0 || Type == PG_Q5_0 || Type == PG_Q8_0 || Type == PG_IQ4_NL) return {f16(0), F{}};
  else if constexpr (Type == PG_MXFP4) return {L::load_power(p, layout.block), F{}};
  // exact in float32: a scale has 11 bits, the distance of its zero point at most 9
  else if constexpr (Type == PG_U4G || Type == PG_U8G) {
    const F d = f16(0);
    return {d, d * (L::splat(Type == PG_U8G ? 128.0f : 0.0f) - u8(16))};
  } else if constexpr (Type == PG_IQ4_XS) return {head(0) * i8(0), F{}};
  else if constexpr (Type == PG_Q4_1 || Type == PG_Q5_1) return {f16(0), f16(16)};
  else if constexpr (Type == PG_Q4_K || Type == PG_Q5_K) return {head(0) * u8(0), -(head(16) * u8(8))};
  else if constexpr (Type == PG_Q2_K) return {head(0) * u8(8 * G), -(head(16) * u8(16 + 8 * G))};
  else return {head(0) * i8(8 * G), F{}};
}

constexpr int kAhead = 4096;  // bytes: a prefetch this far in front of the reader comes in time

PG_INLINE float* place_of(const Part& part, int64_t panel, int64_t row, const Out& out) {
  return out.data + row * out.stride + part.first_row + panel * kPanel;
}

PG_INLINE void put(const Part& part, int64_t panel, int64_t row, const Out& out, F v) {
  const int64_t lanes = part.rows - panel * kPanel;
  float* to = place_of(part, panel, row, out);
  if (out.bias) v += load(out.bias + part.first_row + panel * kPanel);
  if (lanes >= kPanel) return store(to, out.add ? load(to) + v : v);
  for (int i = 0; i < lanes; i++) to[i] = out.add ? to[i] + v[i] : v[i];
}

// Call F<type>::run for the part's type.
#define PG_FOR_TYPE(type, call)              \
  switch (type) {                            \
    case PG_F32: call(PG_F32); break;        \
    case PG_F16: call(PG_F16); break;        \
    case PG_BF16: call(PG_BF16); break;      \
    case PG_Q4_0: call(PG_Q4_0); break;      \
    case PG_Q4_1: call(PG_Q4_1); break;      \
    case PG_Q5_0: call(PG_Q5_0); break;      \
    case PG_Q5_1: call(PG_Q5_1); break;      \
    case PG_Q8_0: call(PG_Q8_0); break;      \
    case PG_Q2_K: call(PG_Q2_K); break;      \
    case PG_Q3_K: call(PG_Q3_K); break;      \
    case PG_Q4_K: call(PG_Q4_K); break;      \
    case PG_Q5_K: call(PG_Q5_K); break;      \
    case PG_IQ4_NL: call(PG_IQ4_NL); break;  \
    case PG_IQ4_XS: call(PG_IQ4_XS); break;  \
    case PG_MXFP4: call(PG_MXFP4); break;    \
    case PG_U4G: call(PG_U4G); break;        \
    case PG_U8G: call(PG_U8G); break;        \
    default: call(PG_Q6_K);                  \
  }

}  // namespace PG_NS
}  // namespace pagoda
