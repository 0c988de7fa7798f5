// Blocks of 32 floats to 8, 5 or 4 bits, for float matrices that are quantized while they are repacked. Loading waits
// for files more than for this, so that it is written once, in vectors that any processor has.
#pragma once
#include <cmath>
#include <cstring>

#include "layout.h"

namespace pagoda {
namespace quantize {

typedef float F4 __attribute__((vector_size(16)));
typedef int32_t I4 __attribute__((vector_size(16)));

constexpr int kVectors = kBlock / 4;
struct Floats {
  F4 v[kVectors];
};

inline F4 of_half(I4 bits) {
  const I4 special = ((bits & 0x7c00) == 0x7c00) & 0x7f800000;
  const F4 magnitude = (F4)((bits & 0x7fff) << 13) * 0x1p112f;
  return (F4)((I4)magnitude | special | (bits & 0x8000) << 16);
}

inline uint16_t to_half(float f) {  // round to nearest even
  uint32_t x;
  memcpy(&x, &f, 4);
  const uint32_t sign = x >> 16 & 0x8000, size = x & 0x7fffffff;
  if (size > 0x7f800000) return sign | 0x7e00;
  if (size >= 0x47800000) return sign | 0x7c00;
  if (size < 0x38800000) return sign | (uint16_t)std::nearbyint(std::fabs(f) * 0x1p24f);
  return sign | (size + 0xc8000fff + (size >> 13 & 1)) >> 13;
}

template <int Type> Floats block_of(const uint8_t* p) {
  Floats x;
  for (int i = 0; i < kVectors; i++) {
    if constexpr (Type == PG_F32) {
      memcpy(&x.v[i], p + 16 * i, 16);
    } else {
      uint16_t h[4];
      memcpy(h, p + 8 * i, 8);
      const I4 bits = {h[0], h[1], h[2], h[3]};
      x.v[i] = Type == PG_F16 ? of_half(bits) : (F4)(bits << 16);
    }
  }
  return x;
}

// Store f as f16; returns what it became.
inline float put_half(float f, uint8_t* to) {
  const uint16_t half = to_half(f);
  memcpy(to, &half, 2);
  return of_half(I4{half, 0, 0, 0})[0];
}

inline F4 splat(float x) { return F4{x, x, x, x}; }
inline F4 min(F4 a, F4 b) { return a < b ? a : b; }
inline F4 max(F4 a, F4 b) { return a > b ? a : b; }
inline float sum(F4 v) { return (v[0] + v[2]) + (v[1] + v[3]); }
inline float least(F4 v) { return std::fmin(std::fmin(v[0], v[1]), std::fmin(v[2], v[3])); }
// Whole numbers, for v from 0 up: nearest below v + 0.5.
inline I4 whole(F4 v) { return __builtin_convertvector(v + 0.5f, I4); }
inline F4 clamp(F4 v, float low, float high) { return min(max(v, splat(low)), splat(high)); }

// 0, or NaN if any value is a NaN or infinite: then the whole block becomes NaN, and its row is reported.
inline float bad(const Floats& x) {
  F4 total = {};
  for (const F4& v : x.v) total += v - v;
  return sum(total);
}

// Codes -127 .. 127 times d.
inline void to_q8_0(const Floats& x, uint8_t* codes, uint8_t* tail) {
  F4 top = {};
  for (const F4& v : x.v) top = max(max(v, -v), top);
  const float d = put_half(-least(-top) / 127.0f + bad(x), tail), inverse = d > 0.0f ? 1.0f / d : 0.0f;
  for (int i = 0; i < kVectors; i++) {
    const I4 code = whole(clamp(x.v[i] * inverse, -127.0f, 127.0f) + 128.0f) - 128;
    for (int j = 0; j < 4; j++) codes[4 * i + j] = (uint8_t)code[j];
  }
}

// Codes 0 .. top times d, plus m: from the span of the block, then twice the least-squares line through the codes; the
// best of the three is kept. Of normal weights in 4 bits the error is 6 % smaller than that of the span alone.
inline void to_line(const Floats& x, float top, uint8_t* codes, uint8_t* tail) {
  F4 low = x.v[0], high = x.v[0], totals = {};
  for (const F4& v : x.v) low = min(low, v), high = max(high, v), totals += v;
  const float total = sum(totals);
  float d = (-least(-high) - least(low)) / top, m = least(low) + bad(x), best = 0.0f;
  for (int round = 0; round < 3; round++) {
    uint8_t fields[4];
    const float scale = put_half(d, fields), minimum = put_half(m, fields + 2), inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
    F4 errors = {}, products = {}, squares = {}, counts = {}, q[kVectors];
    for (int i = 0; i < kVectors; i++) {
      q[i] = __builtin_convertvector(whole(clamp((x.v[i] - minimum) * inverse, 0.0f, top)), F4);
      const F4 off = q[i] * scale + minimum - x.v[i];
      errors += off * off, products += q[i] * x.v[i], squares += q[i] * q[i], counts += q[i];
    }
    if (const float error = sum(errors); round == 0 || error < best) {
      best = error;
      memcpy(tail, fields, 4);
      for (int i = 0; i < kBlock; i++) codes[i] = (uint8_t)q[i / 4][i % 4];
    }
    const float n = sum(counts), spread = sum(squares) - n * n / kBlock;
    if (!(spread > 0.0f)) return;
    d = (sum(products) - n * total / kBlock) / spread, m = (total - d * n) / kBlock;
  }
}

}  // namespace quantize
}  // namespace pagoda
