// Random activations and panels for the tests.
#pragma once
#include <cstring>
#include <random>
#include <vector>

#include "kernels.h"

namespace pagoda {

inline std::mt19937 rng(1);

inline std::vector<float> normal(int64_t n, float scale = 1.0f) {
  std::normal_distribution<float> distribution(0.0f, scale);
  std::vector<float> v(n);
  for (float& x : v) x = distribution(rng);
  return v;
}

struct Quantized {  // activations
  Quantized(const Kernels& t, const std::vector<float>& x) : q(x.size()), d(x.size() / 32), s(d.size()), n(d.size()), h(2 * d.size()), wide(x.size()) {
    t.quantize(x.data(), x.size(), {q.data(), d.data(), s.data(), n.data(), h.data(), wide.data(), nullptr});
    if (t.to_bf16) bf16.resize(x.size()), t.to_bf16(x.data(), x.size(), bf16.data());
  }
  std::vector<int8_t> q;
  std::vector<float> d, s;
  std::vector<int32_t> n, h;
  std::vector<int16_t> wide;
  std::vector<uint16_t> bf16;
  Rows rows(const std::vector<float>& x, int64_t k) const {
    return {x.data(), q.data(), d.data(), s.data(), n.data(), h.data(), wide.data(), bf16.empty() ? nullptr : bf16.data(), k};
  }
  float rounded(float x, int64_t i) const {  // value i, as products in bf16 take it
    if (bf16.empty()) return x;
    const uint32_t bits = (uint32_t)bf16[i] << 16;
    memcpy(&x, &bits, sizeof x);
    return x;
  }
};

// Random panels: any bytes are codes; the f16 scales behind or in front of them are made small and finite.
inline std::vector<uint8_t> random_panels(int32_t type, int64_t panels, int64_t k) {
  std::vector<uint8_t> w(panels * panel_bytes(type, k));
  if (type == PG_F32) {
    const std::vector<float> values = normal(w.size() / 4);
    memcpy(w.data(), values.data(), w.size());
    return w;
  }
  for (uint8_t& b : w) b = (uint8_t)rng();
  const auto small = [&](uint8_t* p, int64_t halves) {  // 2^-5 to 2^-3 as f16, about 1 as bf16, of either sign
    for (int64_t i = 0; i < halves; i++) {
      const uint16_t bits = (rng() & 0x8000) | (type == PG_BF16 ? 0x3f00 + rng() % 256 : 0x2800 + rng() % 2048);
      memcpy(p + 2 * i, &bits, 2);
    }
  };
  if (is_float(type)) return small(w.data(), w.size() / 2), w;
  const Layout l = layout_of(type);
  const int tail = type == PG_Q4_1 || type == PG_Q5_1 ? 32 : type == PG_U4G || type == PG_U8G ? 24 : 16;
  uint8_t* p = w.data();
  for (int64_t b = 0; b < panels * k / kBlock; b++, p += l.block) {
    if (l.header && b % (2 * kSuper) == 0) small(p, l.header), p += 2 * l.header;  // of both panels of a pair
    if (type == PG_MXFP4) for (int i = 0; i < kPanel; i++) p[128 + i] = (uint8_t)(120 + rng() % 8);
    else if (!l.header) small(p + l.block - tail, tail == 32 ? 16 : 8);
  }
  return w;
}

}  // namespace pagoda
