// Whether two tables of kernels agree. A processor is trusted no further than tried: it may be emulated.
#pragma once
#include <cstring>
#include <vector>

#include "kernels.h"

namespace pagoda {

// One small product, bit for bit.
inline bool same_product(const Kernels& a, const Kernels& b) {
  constexpr int64_t k = 96, blocks = k / kBlock, rows = 17, outputs = 2 * kPanel;
  std::vector<uint8_t> w(2 * panel_bytes(PG_Q4_1, k));
  for (size_t i = 0; i < w.size(); i++) w[i] = i * i * 73 >> 3 & 0xbf;  // as f16: below 2, of either sign
  std::vector<float> x(rows * k), d(rows * blocks), s(rows * blocks);
  for (size_t i = 0; i < x.size(); i++) x[i] = (float)(i * 29 % 101) - 50.0f;
  std::vector<int8_t> q(rows * k);
  std::vector<int32_t> n(rows * blocks), h(2 * rows * blocks);
  b.quantize(x.data(), rows * k, {q.data(), d.data(), s.data(), n.data(), h.data(), nullptr, nullptr});
  const Part part = {PG_Q4_1, outputs, 0, 0, panel_bytes(PG_Q4_1, k), w.data()};
  const Rows activations = {x.data(), q.data(), d.data(), s.data(), n.data(), h.data(), nullptr, nullptr, k};
  std::vector<float> one(rows * outputs), other(rows * outputs);
  a.matmul(part, 0, 2, activations, 0, rows, {one.data(), outputs, nullptr, false});
  b.matmul(part, 0, 2, activations, 0, rows, {other.data(), outputs, nullptr, false});
  return memcmp(one.data(), other.data(), one.size() * sizeof(float)) == 0;
}

}  // namespace pagoda
