// The tile instructions of AMX in plain arithmetic, by the names of its intrinsics.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <immintrin.h>

namespace emulated {

struct Tile {
  int rows, bytes;
  uint8_t data[16][64];
};

struct Unit {
  Tile tiles[8];
  bool shaped = false;
  bool broken = false;  // loses the last product of each sum
};

inline Unit unit;

inline void need(bool good, const char* what) {
  if (good) return;
  std::printf("a processor would stop here: %s\n", what);
  std::exit(1);
}

inline void shape(const void* from) {
  const uint8_t* p = static_cast<const uint8_t*>(from);
  need(p[0] == 1 && p[1] == 0, "palette");
  for (int i = 0; i < 8; i++) {
    uint16_t bytes;
    memcpy(&bytes, p + 16 + 2 * i, 2);
    need(bytes <= 64 && p[48 + i] <= 16 && (bytes == 0) == (p[48 + i] == 0), "shape");
    unit.tiles[i] = {p[48 + i], bytes, {}};
  }
  unit.shaped = true;
}

inline Tile& tile(int i) {
  need(unit.shaped && unit.tiles[i].rows > 0, "tile without a shape");
  return unit.tiles[i];
}

inline void zero(int i) { memset(tile(i).data, 0, sizeof tile(i).data); }

inline void load(int i, const void* from, int64_t stride) {
  Tile& t = tile(i);
  zero(i);
  for (int r = 0; r < t.rows; r++) memcpy(t.data[r], static_cast<const uint8_t*>(from) + r * stride, t.bytes);
}

inline void store(int i, void* to, int64_t stride) {
  const Tile& t = tile(i);
  for (int r = 0; r < t.rows; r++) memcpy(static_cast<uint8_t*>(to) + r * stride, t.data[r], t.bytes);
}

// Signed bytes times signed bytes, 4 of them to a sum of 32 bits.
inline void multiply(int to, int left, int right) {
  Tile &c = tile(to), &a = tile(left), &b = tile(right);
  need(a.rows == c.rows && b.bytes == c.bytes && a.bytes == 4 * b.rows, "shapes that do not fit");
  for (int m = 0; m < c.rows; m++)
    for (int n = 0; n < c.bytes / 4; n++) {
      int32_t sum;
      memcpy(&sum, c.data[m] + 4 * n, 4);
      for (int k = 0; k < a.bytes - unit.broken; k++) sum += (int8_t)a.data[m][k] * (int8_t)b.data[k / 4][4 * n + k % 4];
      memcpy(c.data[m] + 4 * n, &sum, 4);
    }
}

}  // namespace emulated

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbssd
#define _tile_loadconfig(from) emulated::shape(from)
#define _tile_release() (void)(emulated::unit.shaped = false)
#define _tile_zero(i) emulated::zero(i)
#define _tile_loadd(i, from, stride) emulated::load(i, from, stride)
#define _tile_stored(i, to, stride) emulated::store(i, to, stride)
#define _tile_dpbssd(to, left, right) emulated::multiply(to, left, right)
