// Matrix products over panels: 8 or 16 outputs at a time, a few rows of activations for each pass over a panel.
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
constexpr bool is_iq4(int t) { return t == PG_IQ4_NL || t == PG_IQ4_XS; }
constexpr bool is_signed(int t) { return t == PG_Q8_0 || t == PG_U8G || is_iq4(t); }  // codes are signed bytes
constexpr bool has_halves(int t) { return t == PG_Q6_K || t == PG_Q2_K || t == PG_Q3_K; }  // a scale for each 16
constexpr int plane_bytes(int t) {
  return t == PG_Q8_0 || t == PG_U8G ? 256 : t == PG_Q2_K ? 64 : t == PG_Q3_K ? 96 : is_five_bit(t) ? 160 : t == PG_Q6_K ? 192 : 128;
}
// Steps that 16-bit sums hold: 2 * step * largest code * 127 must stay below 32768.
constexpr int period(int t) { return t == PG_Q6_K ? 2 : is_five_bit(t) || has_halves(t) ? 4 : 8; }

template <int N, typename B> PG_INLINE B down(B v, uint8_t mask) {
  B m = B{} + mask;
  if constexpr (N > 0) return shr<N>(v) & m;
  else if constexpr (N < 0) return shl<-N>(v) & m;
  else return v & m;
}

alignas(16) constexpr int8_t kIq4Values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

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

// A pair of panels from w, or its second one alone, times M rows. The order of every sum is fixed by K alone, so a row's result does not depend
// on M, or on which panels go together.
template <int Type, int M>
PG_INLINE void quantized_panels(const uint8_t* w, bool second, const Rows& a, int64_t row, Lanes::F* out) {
  using L = Lanes;
  constexpr Layout layout = layout_of(Type);
  constexpr int groups = has_halves(Type) ? 2 : 1, steps = 8 / groups, offset = offset_of<Type>();
  const int64_t blocks = a.k / kBlock;
  const int8_t* q = a.q + row * a.k;
  const float *d = a.d + row * blocks, *s = a.s + row * blocks;
  const int32_t* sums = (groups == 2 ? a.h : a.n) + row * blocks * groups;
  const uint8_t* header = w;
  for (int i = 0; i < M; i++) out[i] = L::F{};
  for (int64_t b = 0; b < blocks; b++, q += kBlock, w += 2 * layout.block) {
    if (layout.header && b % kSuper == 0) header = w + second * layout.header, w += 2 * layout.header;
    const uint8_t* block = w + second * layout.block;
    for (int line = 0; line < 2 * layout.block; line += 64) __builtin_prefetch(w + kAhead + line);
    unroll<groups>([&](auto g) __attribute__((always_inline)) {
      std::conditional_t<is_signed(Type), DotSigned, Dot<period(Type)>> dot[M];
      for (int i = 0; i < M; i++) dot[i].sum = offset ? L::splat_i(-offset * sums[(i * blocks + b) * groups + g.value]) : L::I{};
      unroll<steps>([&](auto v) __attribute__((always_inline)) {
        constexpr int V = g.value * steps + v.value;
        const auto code = codes<L, Type, V>(block);
        for (int i = 0; i < M; i++) dot[i].template add<V>(code, q + i * a.k + 4 * V);
      });
      const auto scale = scales<L, Type, g.value>(block, header);
      for (int i = 0; i < M; i++) {
        out[i] = fma(to_float(dot[i].sum), scale.d * L::splat(d[i * blocks + b]), out[i]);
        if constexpr (has_min<Type>()) {
          const float sum = groups == 2 ? d[i * blocks + b] * (float)sums[(i * blocks + b) * 2 + g.value] : s[i * blocks + b];
          out[i] = fma(scale.m, L::splat(sum), out[i]);
        }
      }
    });
  }
}

template <int Type> PG_INLINE F load_float(const uint8_t* p) {
  if constexpr (Type == PG_F32) return load((const float*)p);
  else if constexpr (Type == PG_F16) return load_f16((const uint16_t*)p);
  else return load_bf16((const uint16_t*)p);
}

// P panels times M rows, one multiply-add after the other along K.
template <int Type, int M, int P>
PG_INLINE void float_panels(const uint8_t* w, int64_t stride, const Rows& a, int64_t row, F (*out)[M]) {
  F acc[P][M] = {};
  for (int64_t k = 0; k < a.k; k++)
    for (int p = 0; p < P; p++) {
      F v = load_float<Type>(w + p * stride + k * kPanel * float_bytes(Type));
      for (int i = 0; i < M; i++) acc[p][i] = fma(v, splat(a.f[(row + i) * a.k + k]), acc[p][i]);
    }
  for (int p = 0; p < P; p++)
    for (int i = 0; i < M; i++) out[p][i] = acc[p][i];
}

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

// Rows of activations in one pass, as many as there are registers for.
#if defined(PG_VNNI)
constexpr int kTile = 8;
#else
constexpr int kTile = 4;
#endif
template <int Type> constexpr int panels_at_once(int m) { return is_float(Type) ? (m == 1 ? 4 : 2) : Lanes::panels; }

// P panels, or the last one alone.
template <int Type, int M, int P>
PG_INLINE void panels(const Part& part, int64_t panel, const Rows& a, int64_t row, const Out& out) {
  const uint8_t* w = part.data + panel * part.stride;
  if constexpr (is_float(Type)) {
    F v[P][M];
    float_panels<Type, M, P>(w, part.stride, a, row, v);
    for (int p = 0; p < P; p++)
      for (int i = 0; i < M; i++) put(part, panel + p, row + i, out, v[p][i]);
  } else {
    Lanes::F v[M];
    const bool second = panel % 2 != 0;
    quantized_panels<Type, M>(w - second * part.stride, second, a, row, v);
    for (int p = 0; p < P; p++)
      for (int i = 0; i < M; i++) put(part, panel + p, row + i, out, Lanes::panel(v[i], p));
  }
}

template <int Type, int M>
void tile(const Part& part, int64_t first, int64_t last, const Rows& a, int64_t row, const Out& out) {
  constexpr int P = panels_at_once<Type>(M);
  int64_t p = first;
  for (; p + P <= last; p += P) panels<Type, M, P>(part, p, a, row, out);
  for (; p < last; p++) panels<Type, M, 1>(part, p, a, row, out);
}

// The tile of n <= M rows.
template <int Type, int M>
void tile_of(int64_t n, const Part& part, int64_t first, int64_t last, const Rows& a, int64_t row, const Out& out) {
  if constexpr (M > 1)
    if (n < M) return tile_of<Type, M - 1>(n, part, first, last, a, row, out);
  tile<Type, M>(part, first, last, a, row, out);
}

#if defined(PG_PACKED)
template <int Type> void packed_panels(const Part& part, int64_t first, int64_t last, const Rows& a, int64_t r0, int64_t r1, const Out& out);
#endif

// Panels [first, last) times rows [r0, r1). A pair of panels stays in the first-level cache while all rows go over it;
// the rows are split evenly into tiles of at most kTile.
template <int Type>
void product(const Part& part, int64_t first, int64_t last, const Rows& a, int64_t r0, int64_t r1, const Out& out) {
  const int64_t rows = r1 - r0;
#if defined(PG_PACKED)
  if constexpr (!is_float(Type))
    if (rows > (is_signed(Type) ? 16 : 8)) return packed_panels<Type>(part, first, last, a, r0, r1, out);
#endif
  const int64_t tiles = (rows + kTile - 1) / kTile, step = rows <= kTile ? last - first : 2;
  for (int64_t p = first; p < last; p += step) {
    const int64_t end = p + step < last ? p + step : last;
    for (int64_t t = 0; t < tiles; t++) {
      const int64_t from = r0 + rows * t / tiles, n = r0 + rows * (t + 1) / tiles - from;
      tile_of<Type, kTile>(n, part, p, end, a, from, out);
    }
  }
}

template <int Type> void row_of(const Part& part, int64_t k, int64_t row, float* out) {
  const uint8_t* w = part.data + row / kPanel * part.stride;
  const int lane = row % kPanel, second = row / kPanel % 2;
  if constexpr (is_float(Type)) {
    for (int64_t i = 0; i < k; i++) out[i] = load_float<Type>(w + i * kPanel * float_bytes(Type))[lane];
  } else {
    constexpr Layout layout = layout_of(Type);
    constexpr int groups = has_halves(Type) ? 2 : 1, steps = 8 / groups;
    w -= second * part.stride;
    const uint8_t* header = w;
    for (int64_t b = 0; b < k / kBlock; b++, w += 2 * layout.block) {
      if (layout.header && b % kSuper == 0) header = w + second * layout.header, w += 2 * layout.header;
      const uint8_t* block = w + second * layout.block;
      unroll<8>([&](auto v) {
        const auto scale = scales<OnePanel, Type, v.value / steps>(block, header);
        const B code = codes<OnePanel, Type, v.value>(block);
        for (int j = 0; j < 4; j++) {
          const uint8_t c = code[4 * lane + j];
          const int value = is_signed(Type) ? (int8_t)c : c - offset_of<Type>();
          out[b * kBlock + 4 * v.value + j] = scale.d[lane] * (float)value + scale.m[lane];
        }
      });
    }
  }
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
    case PG_U4G: call(PG_U4G); break;        \
    case PG_U8G: call(PG_U8G); break;        \
    default: call(PG_Q6_K);                  \
  }

void matmul(const Part& part, int64_t p0, int64_t p1, const Rows& a, int64_t r0, int64_t r1, const Out& out) {
#define PG_CALL(T) product<T>(part, p0, p1, a, r0, r1, out)
  PG_FOR_TYPE(part.type, PG_CALL)
#undef PG_CALL
}

void dequantize_row(const Part& part, int64_t k, int64_t row, float* out) {
#define PG_CALL(T) row_of<T>(part, k, row, out)
  PG_FOR_TYPE(part.type, PG_CALL)
#undef PG_CALL
}

}  // namespace PG_NS
}  // namespace pagoda
