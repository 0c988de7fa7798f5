// Matrix products over panels: 8 or 16 outputs at a time, a few rows of activations for each pass over a panel.
#pragma once
#include "panel.h"

namespace pagoda {
namespace PG_NS {

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

// Of the 8 rows of a panel at p, the value with index J of those that lie side by side.
template <int Type, int J> PG_INLINE F load_float(const uint8_t* p) {
  if constexpr (Type == PG_F32) return load((const float*)p);
  else if constexpr (Type == PG_F16) return load_f16((const uint16_t*)p);
  else return load_bf16((const uint16_t*)p, J);
}
template <int Type> constexpr int kSideBySide = Type == PG_BF16 ? 2 : 1;
template <int Type> constexpr int kFloatStep = Type == PG_BF16 ? 4 * 2 * kPanel : kPanel * float_bytes(Type);  // bytes to what follows
template <int Type> PG_INLINE const uint8_t* float_panel(const Part& part, int64_t panel) {
  const int64_t second = Type == PG_BF16 ? panel % 2 : 0;
  return part.data + (panel - second) * part.stride + second * kFloatStep<Type> / 2;
}

// P panels times M rows, one multiply-add after the other along K.
template <int Type, int M, int P>
PG_INLINE void float_panels(const Part& part, int64_t panel, const Rows& a, int64_t row, F (*out)[M]) {
  const uint8_t* w[P];
  for (int p = 0; p < P; p++) w[p] = float_panel<Type>(part, panel + p);
  F acc[P][M] = {};
  const auto add = [&](int64_t step, auto j) __attribute__((always_inline)) {
    for (int p = 0; p < P; p++) {
      const F v = load_float<Type, j.value>(w[p] + step * kFloatStep<Type>);
      for (int i = 0; i < M; i++) acc[p][i] = fma(v, splat(a.f[(row + i) * a.k + step * kSideBySide<Type> + j.value]), acc[p][i]);
    }
  };
  const int64_t steps = a.k / kSideBySide<Type>;
  for (int64_t step = 0; step < steps; step++) unroll<kSideBySide<Type>>([&](auto j) __attribute__((always_inline)) { add(step, j); });
  if (a.k % kSideBySide<Type>) add(steps, std::integral_constant<int, 0>{});
  for (int p = 0; p < P; p++)
    for (int i = 0; i < M; i++) out[p][i] = acc[p][i];
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
  if constexpr (is_float(Type)) {
    F v[P][M];
    float_panels<Type, M, P>(part, panel, a, row, v);
    for (int p = 0; p < P; p++)
      for (int i = 0; i < M; i++) put(part, panel + p, row + i, out, v[p][i]);
  } else {
    Lanes::F v[M];
    quantized_panels<Type, M>(part.data + panel / 2 * 2 * part.stride, panel % 2 != 0, a, row, v);
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
    if (rows > kTile + 1) return packed_panels<Type>(part, first, last, a, r0, r1, out);
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
  const int lane = row % kPanel, second = row / kPanel % 2;
  if constexpr (is_float(Type)) {
    const uint8_t* w = float_panel<Type>(part, row / kPanel);
    for (int64_t i = 0; i < k; i++) {
      const uint8_t* at = w + i / kSideBySide<Type> * kFloatStep<Type>;
      out[i] = (i % kSideBySide<Type> ? load_float<Type, 1>(at) : load_float<Type, 0>(at))[lane];
    }
  } else {
    constexpr Layout layout = layout_of(Type);
    constexpr int groups = has_halves(Type) ? 2 : 1, steps = 8 / groups;
    const uint8_t *w = part.data + row / kPanel / 2 * 2 * part.stride, *header = w;
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
