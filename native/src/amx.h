// Products for 16 rows of activations and more, in AMX tiles. The sums are those of quantized_panels with VNNI, bit for bit.
#pragma once
#include "panel.h"

namespace pagoda {
namespace PG_NS {

constexpr int kTileRows = 16;     // of activations
constexpr int kTileBlocks = 18;   // unpacked at a time: they stay in the first-level cache
constexpr int kTilesKept = 16;    // whose sums wait while the blocks change

// GCC does not know that a tile, or its shape, is read from memory.
PG_INLINE void written(const void* p) { asm volatile("" ::"r"(p) : "memory"); }

// A block of a pair of panels: row v of the second operand of a tile product is vector v of the codes, signed and without
// their offset. One half of it for types with a scale for each 16.
template <int Type> struct alignas(64) Unpacked {
  static constexpr int groups = has_halves(Type) ? 2 : 1, steps = 8 / groups;
  B64 codes[8];
  F16 d[groups], m[groups];
};

// Blocks [from, to) of the pair of panels at w.
template <int Type> void unpack(const uint8_t* w, int64_t from, int64_t to, Unpacked<Type>* out) {
  using U = Unpacked<Type>;
  constexpr Layout layout = layout_of(Type);
  constexpr int super = 2 * (layout.header + kSuper * layout.block);
  constexpr uint8_t offset = is_signed(Type) ? 0 : offset_of<Type>();
  for (int64_t b = from; b < to; b++) {
    U& u = out[b - from];
    const uint8_t* header = w + b / kSuper * super;
    const uint8_t* block = header + 2 * layout.header + b % kSuper * 2 * layout.block;
    for (int line = 0; line < 2 * layout.block; line += 64) __builtin_prefetch(block + kAhead + line);
    unroll<8>([&](auto v) __attribute__((always_inline)) { u.codes[v.value] = codes<Lanes, Type, v.value>(block) - offset; });
    unroll<U::groups>([&](auto g) __attribute__((always_inline)) {
      const auto scale = scales<Lanes, Type, g.value>(block, header);
      u.d[g.value] = scale.d, u.m[g.value] = scale.m;
    });
  }
  written(out);
}

// Blocks [from, to), unpacked, times 16 rows from `row` on, added to out.
template <int Type>
void multiply_tile(const Unpacked<Type>* w, int64_t from, int64_t to, const Rows& a, int64_t row, F16* out) {
  using U = Unpacked<Type>;
  alignas(64) int32_t products[kTileRows][16];
  const int64_t blocks = a.k / kBlock;
  F16 sum[kTileRows];
  unroll<kTileRows>([&](auto i) __attribute__((always_inline)) { sum[i.value] = out[i.value]; });
  for (int64_t b = from; b < to; b++, w++)
    unroll<U::groups>([&](auto g) __attribute__((always_inline)) {
      constexpr int G = g.value;
      _tile_zero(0);
      _tile_loadd(1, a.q + row * a.k + b * kBlock + 4 * U::steps * G, a.k);
      _tile_loadd(2, &w->codes[U::steps * G], 64);
      _tile_dpbssd(0, 1, 2);
      _tile_stored(0, products, 64);
      const F16 scale = w->d[G], minimum = w->m[G];
      unroll<kTileRows>([&](auto i) __attribute__((always_inline)) {
        constexpr int I = i.value;
        const int64_t at = (row + I) * blocks + b;
        I16 product;
        memcpy(&product, products[I], sizeof product);
        sum[I] = fma(to_float(product), scale * Lanes::splat(a.d[at]), sum[I]);
        if constexpr (has_min<Type>()) {
          const float size = U::groups == 2 ? a.d[at] * (float)a.h[2 * at + G] : a.s[at];
          sum[I] = fma(minimum, Lanes::splat(size), sum[I]);
        }
      });
    });
  unroll<kTileRows>([&](auto i) __attribute__((always_inline)) { out[i.value] = sum[i.value]; });
}

// A pair of panels, or only its first one, times rows [r0, r1). The last tile overlaps the one before it where 16 does not
// divide the rows.
template <int Type>
void multiply_pair(const Part& part, int64_t panel, int panels, const Rows& a, int64_t r0, int64_t r1, const Out& out) {
  Unpacked<Type> w[kTileBlocks];
  F16 sums[kTilesKept][kTileRows];
  const int64_t blocks = a.k / kBlock, tiles = (r1 - r0 + kTileRows - 1) / kTileRows;
  const auto row_of = [=](int64_t t) { return t + 1 < tiles ? r0 + t * kTileRows : r1 - kTileRows; };
  for (int64_t t = 0; t < tiles; t++)
    for (F16& sum : sums[t]) sum = F16{};
  for (int64_t b = 0; b < blocks; b += kTileBlocks) {
    const int64_t end = b + kTileBlocks < blocks ? b + kTileBlocks : blocks;
    unpack<Type>(part.data + panel * part.stride, b, end, w);
    for (int64_t t = 0; t < tiles; t++) multiply_tile<Type>(w, b, end, a, row_of(t), sums[t]);
  }
  for (int64_t t = 0; t < tiles; t++)
    for (int64_t row = r0 + t * kTileRows; row < r1 && row < r0 + (t + 1) * kTileRows; row++)
      for (int p = 0; p < panels; p++) put(part, panel + p, row, out, Lanes::panel(sums[t][row - row_of(t)], p));
}

struct alignas(64) TileShapes {  // as the processor reads them
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

template <int Type>
void tile_product(const Part& part, int64_t first, int64_t last, const Rows& a, int64_t r0, int64_t r1, const Out& out) {
  constexpr int steps = Unpacked<Type>::steps;
  constexpr int64_t most = kTilesKept * kTileRows;
  TileShapes shapes;
  shapes.rows[0] = kTileRows, shapes.row_bytes[0] = 64;
  shapes.rows[1] = kTileRows, shapes.row_bytes[1] = 4 * steps;
  shapes.rows[2] = steps, shapes.row_bytes[2] = 64;
  written(&shapes);
  _tile_loadconfig(&shapes);
  const int64_t rows = r1 - r0, cuts = (rows + most - 1) / most;
  for (int64_t p = first; p < last; p += 2)
    for (int64_t cut = 0; cut < cuts; cut++)
      multiply_pair<Type>(part, p, last - p < 2 ? 1 : 2, a, r0 + rows * cut / cuts, r0 + rows * (cut + 1) / cuts, out);
  _tile_release();
}

void matmul(const Part& part, int64_t p0, int64_t p1, const Rows& a, int64_t r0, int64_t r1, const Out& out) {
  if (is_float(part.type) || r1 - r0 < kTileRows) return kernels_bf16()->matmul(part, p0, p1, a, r0, r1, out);
#define PG_CALL(T) \
  if constexpr (!is_float(T)) tile_product<T>(part, p0, p1, a, r0, r1, out)
  PG_FOR_TYPE(part.type, PG_CALL)
#undef PG_CALL
}

}  // namespace PG_NS
}  // namespace pagoda
