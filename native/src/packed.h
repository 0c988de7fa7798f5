// Products for many rows of activations, in AVX2: a pair of panels is unpacked once, into the first-level cache, and all
// rows go over it in tiles, so that loads are shared. The sums are those of quantized_panels, bit for bit.
#pragma once
#include "matmul.h"

namespace pagoda {
namespace PG_NS {

constexpr int kPackedRows = 4;  // in a tile
constexpr int kPackedBlocks = 18;   // unpacked at a time
constexpr int kPackedFew = 24;      // rows that are soon done with what is unpacked
constexpr int kPackedFewWide = 9;   // blocks for them, of codes in 16 bits: more push what comes next out of the cache
constexpr int kPackedMany = 256;    // rows that keep sums while the blocks change

// What a block of a pair of panels becomes: for each step the codes of both, then scales of both, then minima. Signed codes
// are widened to 16 bits: 8 steps with the even ones of each four, 8 with the odd ones, as the activations in Rows::wide.
template <int Type> struct Packed {
  static constexpr bool wide = is_signed(Type);
  static constexpr int groups = has_halves(Type) ? 2 : 1, steps = (wide ? 16 : 8) / groups;
  static constexpr int codes = groups * steps * 2 * sizeof(B), scales = groups * 2 * sizeof(F);
  static constexpr int bytes = codes + scales * (has_min<Type>() ? 2 : 1);
};

// A pair of panels as it lies in memory.
template <int Type> struct Stored {
  static constexpr Layout layout = layout_of(Type);
  const uint8_t *header, *block;  // of the first panel
  Stored(const uint8_t* pair, int64_t b) : header(pair), block(pair + b * 2 * layout.block) {
    if (layout.header) header += b / kSuper * 2 * (layout.header + kSuper * layout.block), block = header + 2 * (layout.header + b % kSuper * layout.block);
  }
  template <int V> PG_INLINE void unpack_codes(const Stored& from, uint8_t* to) {
    for (int p = 0; p < 2; p++) {
      const B c = codes<OnePanel, Type, V>(from.block + p * layout.block);
      ((B*)to)[2 * V + p] = Packed<Type>::wide ? even_bytes(c) : c;
      if (Packed<Type>::wide) ((B*)to)[2 * V + 16 + p] = odd_bytes(c);
    }
  }
  template <int G> PG_INLINE void unpack_scales(const Stored& from, uint8_t* to) {
    using P = Packed<Type>;
    for (int p = 0; p < 2; p++) {
      const auto scale = scales<OnePanel, Type, G>(from.block + p * layout.block, from.header + p * layout.header);
      ((F*)(to + P::codes))[2 * G + p] = scale.d;
      if (has_min<Type>()) ((F*)(to + P::codes))[2 * (P::groups + G) + p] = scale.m;
    }
  }
};

// Where a tile stands: its first row, and blocks of K.
struct Place {
  int64_t row, block, blocks;
};

// M rows times unpacked blocks, added to `sums`. The first tile unpacks them on its way, from `pair`: stores and
// multiplications do not wait for each other.
template <int Type, int M, bool First>
PG_INLINE void packed_tile(const uint8_t* pair, uint8_t* w, const Rows& a, const Place& at, F (*sums)[2]) {
  using P = Packed<Type>;
  constexpr int offset = offset_of<Type>(), bytes = P::wide ? 2 : 1;  // of an activation
  const int64_t blocks = a.k / kBlock, first = at.row * blocks + at.block;
  const uint8_t* q = (P::wide ? (const uint8_t*)a.wide : (const uint8_t*)a.q) + first * kBlock * bytes;
  const float *d = a.d + first, *s = a.s + first;
  const int32_t* counts = (P::groups == 2 ? a.h : a.n) + first * P::groups;
  for (int64_t b = 0; b < at.blocks; b++, q += kBlock * bytes, w += P::bytes) {
    const Stored<Type> stored(pair, at.block + b);
    unroll<P::groups>([&](auto g) __attribute__((always_inline)) {
      std::conditional_t<P::wide, DotWide, Dot<period(Type)>> dot[M][2] = {};
      unroll<P::steps>([&](auto v) __attribute__((always_inline)) {
        constexpr int V = g.value * P::steps + v.value;
        if constexpr (First && V < 8) Stored<Type>::template unpack_codes<V>(stored, w);
        const B c0 = ((const B*)w)[2 * V], c1 = ((const B*)w)[2 * V + 1];
        for (int i = 0; i < M; i++) {
          const auto x = shared_bytes(q + i * a.k * bytes + 4 * V);
          dot[i][0].template step<V>(c0, x), dot[i][1].template step<V>(c1, x);
        }
      });
      if constexpr (First) Stored<Type>::template unpack_scales<g.value>(stored, w);
      const F* scale = (const F*)(w + P::codes) + 2 * g.value;
      for (int i = 0; i < M; i++) {
        const int64_t n = i * blocks + b;
        for (int p = 0; p < 2; p++) {
          const I sum = offset ? dot[i][p].sum - splat_i(counts[n * P::groups + g.value]) * offset : dot[i][p].sum;
          sums[i][p] = fma(to_float(sum), scale[p] * splat(d[n]), sums[i][p]);
          if constexpr (has_min<Type>()) {
            const float x = P::groups == 2 ? d[n] * (float)counts[2 * n + g.value] : s[n];
            sums[i][p] = fma(scale[2 * P::groups + p], splat(x), sums[i][p]);
          }
        }
      }
    });
  }
}

// One or two panels of a pair, and where their results go.
struct Target {
  const Part& part;
  int64_t panel, panels;
  const Out& out;
};

// m = M or M - 1 rows, as more than 5 are always split; the first blocks begin with zeros, the last ones end in the output.
template <int Type, int M, bool First>
void packed_tile_of(int64_t m, const uint8_t* pair, uint8_t* w, const Rows& a, const Place& at, F (*kept)[2], const Target& to) {
  if constexpr (M > kPackedRows - 1)
    if (m < M) return packed_tile_of<Type, M - 1, First>(m, pair, w, a, at, kept, to);
  F sums[M][2];
  for (int i = 0; i < M; i++)  // one by one: to clear them all at once would take a string instruction, 30 cycles
    for (int p = 0; p < 2; p++) sums[i][p] = at.block ? kept[i][p] : F{};
  const bool last = at.block + at.blocks == a.k / kBlock;
  if (last)
    for (int i = 0; i < M; i++) __builtin_prefetch(place_of(to.part, to.panel, at.row + i, to.out), 1);
  packed_tile<Type, M, First>(pair, w, a, at, sums);
  if (last) {
    unroll<M>([&](auto i) __attribute__((always_inline)) {
      put(to.part, to.panel, at.row + i.value, to.out, sums[i.value][0]);
      if (to.panels > 1) put(to.part, to.panel + 1, at.row + i.value, to.out, sums[i.value][1]);
    });
  } else {
    for (int i = 0; i < M; i++) kept[i][0] = sums[i][0], kept[i][1] = sums[i][1];
  }
}

// What is unpacked next: into the second-level cache if it comes fast, since the first would lose what is in use.
PG_INLINE void fetch(const uint8_t* from, const uint8_t* end, bool fast) {
  for (; from < end; from += 64) fast ? __builtin_prefetch(from, 0, 2) : __builtin_prefetch(from);
}

// A pair of panels times rows [r0, r1), at most kPackedMany.
template <int Type> void packed_pair(const Target& to, const Rows& a, int64_t r0, int64_t r1) {
  alignas(64) uint8_t w[kPackedBlocks * Packed<Type>::bytes];
  alignas(64) F kept[kPackedMany][2];
  const uint8_t* pair = to.part.data + to.panel * to.part.stride;
  const int64_t rows = r1 - r0, tiles = (rows + kPackedRows - 1) / kPackedRows;
  const int64_t most = Packed<Type>::wide && rows <= kPackedFew ? kPackedFewWide : kPackedBlocks;
  const int64_t bytes = 2 * to.part.stride, blocks = a.k / kBlock, passes = (blocks + most - 1) / most;
  for (int64_t pass = 0; pass < passes; pass++) {
    const int64_t block = blocks * pass / passes, end = blocks * (pass + 1) / passes;
    const int64_t next = bytes * end / blocks, size = bytes * (end - block) / blocks;  // what is unpacked after this
    for (int64_t t = 0; t < tiles; t++) {
      const int64_t from = rows * t / tiles, m = rows * (t + 1) / tiles - from;
      fetch(pair + next + size * t / tiles, pair + next + size * (t + 1) / tiles, rows <= kPackedFew);
      const Place at = {r0 + from, block, end - block};
      if (t == 0) packed_tile_of<Type, kPackedRows, true>(m, pair, w, a, at, kept + from, to);
      else packed_tile_of<Type, kPackedRows, false>(m, pair, w, a, at, kept + from, to);
    }
  }
}

template <int Type>
void packed_panels(const Part& part, int64_t first, int64_t last, const Rows& a, int64_t r0, int64_t r1, const Out& out) {
  const int64_t rows = r1 - r0, cuts = (rows + kPackedMany - 1) / kPackedMany;
  for (int64_t p = first; p < last; p += 2)
    for (int64_t cut = 0; cut < cuts; cut++)
      packed_pair<Type>({part, p, last - p < 2 ? 1 : 2, out}, a, r0 + rows * cut / cuts, r0 + rows * (cut + 1) / cuts);
}

}  // namespace PG_NS
}  // namespace pagoda
