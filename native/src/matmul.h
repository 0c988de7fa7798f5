// Matrix products over panels: 8 outputs at a time, 1 to 4 rows of activations for each pass over a panel.
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

template <int N> PG_INLINE B down(B v, uint8_t mask) {
  B m = B{} + mask;
  if constexpr (N > 0) return shr<N>(v) & m;
  else if constexpr (N < 0) return shl<-N>(v) & m;
  else return v & m;
}

alignas(16) constexpr int8_t kIq4Values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

// Vector V of the codes of the block at p.
template <int Type, int V> PG_INLINE B codes(const uint8_t* p) {
  if constexpr (Type == PG_Q8_0 || Type == PG_U8G) return load_bytes(p + 32 * V);
  else if constexpr (Type == PG_Q2_K || Type == PG_Q3_K) {
    B low = down<2 * (V % 4)>(load_bytes(p + 32 * (V / 4)), 3);
    if constexpr (Type == PG_Q3_K) return low | down<V - 2>(load_bytes(p + 64), 4);
    return low;
  } else {
    B low = down<4 * (V % 2)>(load_bytes(p + 32 * (V / 2)), 15);
    if constexpr (is_iq4(Type)) return look_up(kIq4Values, low);
    if constexpr (is_five_bit(Type)) return low | down<V - 4>(load_bytes(p + 128), 16);
    if constexpr (Type == PG_Q6_K) return low | down<2 * (V % 4) - 4>(load_bytes(p + 128 + 32 * (V / 4)), 48);
    return low;
  }
}

// value = d * code + m for the 8 rows of a block (or of its half G).
struct Scales {
  F d, m;
};
template <int Type> constexpr bool has_min() { return !is_signed(Type) || Type == PG_U8G || kSignedOffset != 0; }
template <int Type, int G> PG_INLINE Scales scales(const uint8_t* block, const uint8_t* header) {
  const uint8_t* p = block + plane_bytes(Type);
  const uint16_t *p16 = (const uint16_t*)p, *h16 = (const uint16_t*)header;
  if constexpr (Type == PG_Q4_0) { F d = load_f16(p16); return {d, d * -8.0f}; }
  else if constexpr (Type == PG_Q5_0) { F d = load_f16(p16); return {d, d * -16.0f}; }
  else if constexpr (Type == PG_Q8_0 || Type == PG_IQ4_NL) { F d = load_f16(p16); return {d, d * -(float)kSignedOffset}; }
  // exact in float32: a scale has 11 bits, the distance of its zero point at most 9
  else if constexpr (Type == PG_U4G) { F d = load_f16(p16); return {d, -(d * load_u8(p + 16))}; }
  else if constexpr (Type == PG_U8G) { F d = load_f16(p16); return {d, d * (splat(128.0f - kSignedOffset) - load_u8(p + 16))}; }
  else if constexpr (Type == PG_IQ4_XS) { F d = load_f16(h16) * load_i8(p); return {d, d * -(float)kSignedOffset}; }
  else if constexpr (Type == PG_Q4_1 || Type == PG_Q5_1) return {load_f16(p16), load_f16(p16 + 8)};
  else if constexpr (Type == PG_Q4_K || Type == PG_Q5_K)
    return {load_f16(h16) * load_u8(p), -(load_f16(h16 + 8) * load_u8(p + 8))};
  else if constexpr (Type == PG_Q2_K)
    return {load_f16(h16) * load_u8(p + 8 * G), -(load_f16(h16 + 8) * load_u8(p + 16 + 8 * G))};
  else {
    F d = load_f16(h16) * load_i8(p + 8 * G);
    return {d, d * (Type == PG_Q6_K ? -32.0f : -4.0f)};
  }
}

// P panels times M rows. The order of every sum is fixed by K alone, so a row's result does not depend on M or P.
template <int Type, int M, int P>
PG_INLINE void quantized_panels(const uint8_t* first, int64_t stride, const Rows& a, int64_t row, F (*out)[M]) {
  constexpr Layout layout = layout_of(Type);
  constexpr int groups = has_halves(Type) ? 2 : 1, steps = 8 / groups;
  const int64_t blocks = a.k / kBlock;
  const int8_t* q = a.q + row * a.k;
  const float *d = a.d + row * blocks, *s = (groups == 2 ? a.h : a.s) + row * blocks * groups;
  const uint8_t *w = first, *header = first;  // of the first panel; the others lie `stride` behind each other
  F acc[P][M] = {};
  for (int64_t b = 0; b < blocks; b++) {
    if (layout.header && b % kSuper == 0) header = w, w += layout.header;
    for (int p = P; p < 2 * P; p++)  // what the next pass reads: the hardware does not see through the strides
      for (int line = 0; line < layout.block; line += 64) __builtin_prefetch(w + p * stride + line);
    unroll<groups>([&](auto g) __attribute__((always_inline)) {
      std::conditional_t<is_signed(Type), DotSigned, Dot<period(Type)>> dot[P][M];
      unroll<steps>([&](auto v) __attribute__((always_inline)) {
        constexpr int V = g.value * steps + v.value;
        B code[P];
        for (int p = 0; p < P; p++) code[p] = codes<Type, V>(w + p * stride);
        for (int i = 0; i < M; i++)
          for (int p = 0; p < P; p++) dot[p][i].template add<V>(code[p], q + i * a.k + b * kBlock + 4 * V);
      });
      for (int p = 0; p < P; p++) {
        Scales scale = scales<Type, g.value>(w + p * stride, header + p * stride);
        for (int i = 0; i < M; i++) {
          acc[p][i] = fma(to_float(dot[p][i].sum), scale.d * splat(d[i * blocks + b]), acc[p][i]);
          if constexpr (has_min<Type>())
            acc[p][i] = fma(scale.m, splat(s[(i * blocks + b) * groups + g.value]), acc[p][i]);
        }
      }
    });
    w += layout.block;
  }
  for (int p = 0; p < P; p++)
    for (int i = 0; i < M; i++) out[p][i] = acc[p][i];
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

PG_INLINE void put(const Part& part, int64_t panel, int64_t row, const Out& out, F v) {
  const int64_t column = part.first_row + panel * kPanel, lanes = part.rows - panel * kPanel;
  float* to = out.data + row * out.stride + column;
  if (out.bias) v += load(out.bias + column);
  if (lanes >= kPanel) return store(to, out.add ? load(to) + v : v);
  for (int i = 0; i < lanes; i++) to[i] = out.add ? to[i] + v[i] : v[i];
}

// Rows of activations and panels in one pass, as many as there are registers for: with several panels, an activation that was loaded serves them all.
#if defined(PG_VNNI)
constexpr int kTile = 6, kQuantizedPanels = 2;
#else
constexpr int kTile = 4, kQuantizedPanels = 1;
#endif
template <int Type> constexpr int panels_at_once(int m) {
  return is_float(Type) ? (m == 1 ? 4 : 2) : m > 4 ? kQuantizedPanels : 1;
}

template <int Type, int M, int P>
PG_INLINE void panels(const Part& part, int64_t panel, const Rows& a, int64_t row, const Out& out) {
  F v[P][M];
  const uint8_t* w = part.data + panel * part.stride;
  if constexpr (is_float(Type)) float_panels<Type, M, P>(w, part.stride, a, row, v);
  else quantized_panels<Type, M, P>(w, part.stride, a, row, v);
  for (int p = 0; p < P; p++)
    for (int i = 0; i < M; i++) put(part, panel + p, row + i, out, v[p][i]);
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

// Panels [first, last) times rows [r0, r1). A few panels stay in the first-level cache while all rows go over them;
// the rows are split evenly into tiles of at most kTile.
template <int Type>
void product(const Part& part, int64_t first, int64_t last, const Rows& a, int64_t r0, int64_t r1, const Out& out) {
  const int64_t rows = r1 - r0, tiles = (rows + kTile - 1) / kTile, step = rows <= kTile ? last - first : panels_at_once<Type>(kTile);
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
  const int lane = row % kPanel;
  if constexpr (is_float(Type)) {
    for (int64_t i = 0; i < k; i++) out[i] = load_float<Type>(w + i * kPanel * float_bytes(Type))[lane];
  } else {
    constexpr Layout layout = layout_of(Type);
    constexpr int groups = has_halves(Type) ? 2 : 1, steps = 8 / groups;
    const uint8_t* header = w;
    for (int64_t b = 0; b < k / kBlock; b++, w += layout.block) {
      if (layout.header && b % kSuper == 0) header = w, w += layout.header;
      unroll<8>([&](auto v) {
        Scales scale = scales<Type, v.value / steps>(w, header);
        B code = codes<Type, v.value>(w);
        const float offset = scale.d[lane] * (is_signed(Type) ? kSignedOffset : 0), least = scale.m[lane] + offset;
        for (int j = 0; j < 4; j++) {
          uint8_t c = code[4 * lane + j];
          float value = is_signed(Type) ? (float)(int8_t)c : (float)c;
          out[b * kBlock + 4 * v.value + j] = scale.d[lane] * value + least;
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
