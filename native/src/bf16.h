// Products of weights in bf16 with activations rounded to bf16, by the instruction that adds two products to a float.
#pragma once
#include "panel.h"
#include "wide.h"

namespace pagoda {
namespace PG_NS {

constexpr int kBf16Rows = 8;  // in a tile

void to_bf16(const float* x, int64_t n, uint16_t* to) {
  const int64_t i = n / 8 * 8;
  store_halves(x, i, to);
  if (i == n) return;
  const __mmask16 rest = (__mmask16)((1u << (n - i)) - 1);
  _mm256_mask_storeu_epi16(to + i, rest, (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(rest, x + i)));
}

// P pairs of panels times M rows, two steps along K after the other two: a row's result depends on nothing else.
template <int M, int P>
void bf16_tile(const Part& part, int64_t panel, int64_t last, const Rows& a, int64_t row, const Out& out) {
  const uint8_t* w = part.data + panel * part.stride;
  const uint16_t* x = a.bf16 + row * a.k;
  __m512 sums[P][M];
  for (int p = 0; p < P; p++)
    for (int i = 0; i < M; i++) sums[p][i] = _mm512_setzero_ps();
  for (int64_t k = 0; k < a.k; k += 2, x += 2, w += 64) {
    __m512bh v[P];
    for (int p = 0; p < P; p++) {
      const uint8_t* at = w + 2 * p * part.stride;
      v[p] = (__m512bh)_mm512_loadu_si512(at);
      __builtin_prefetch(at + kAhead);
    }
    for (int i = 0; i < M; i++) {
      int32_t two;
      memcpy(&two, x + i * a.k, 4);
      const __m512bh both = (__m512bh)_mm512_set1_epi32(two);
      for (int p = 0; p < P; p++) sums[p][i] = _mm512_dpbf16_ps(sums[p][i], v[p], both);
    }
  }
  for (int p = 0; p < 2 * P && panel + p < last; p++)
    for (int i = 0; i < M; i++) put(part, panel + p, row + i, out, Lanes::panel((F16)sums[p / 2][i], p % 2));
}

template <int M>
void bf16_tiles(int64_t m, const Part& part, int64_t first, int64_t last, const Rows& a, int64_t row, const Out& out) {
  if constexpr (M > 1)
    if (m < M) return bf16_tiles<M - 1>(m, part, first, last, a, row, out);
  constexpr int P = M <= 2 ? 4 : 2;  // pairs at once: few rows have no other sums to work on while one is added to
  int64_t p = first;
  for (; p + 2 * P <= last; p += 2 * P) bf16_tile<M, P>(part, p, last, a, row, out);
  for (; p < last; p += 2) bf16_tile<M, 1>(part, p, last, a, row, out);
}

void matmul(const Part& part, int64_t p0, int64_t p1, const Rows& a, int64_t r0, int64_t r1, const Out& out) {
  if (part.type != PG_BF16 || !a.bf16) return kernels_avx512()->matmul(part, p0, p1, a, r0, r1, out);
  const int64_t rows = r1 - r0, tiles = (rows + kBf16Rows - 1) / kBf16Rows, step = tiles == 1 ? p1 - p0 : 4;
  for (int64_t p = p0; p < p1; p += step) {
    const int64_t end = p + step < p1 ? p + step : p1;
    for (int64_t t = 0; t < tiles; t++) {
      const int64_t from = rows * t / tiles;
      bf16_tiles<kBf16Rows>(rows * (t + 1) / tiles - from, part, p, end, a, r0 + from, out);
    }
  }
}

}  // namespace PG_NS
}  // namespace pagoda
