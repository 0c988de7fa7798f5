// What encoders need row by row beside a decoder's kernels: layer norm and the forms of GELU.
#pragma once
#include "kernels.h"
#include "vec.h"

namespace pagoda {
namespace PG_NS {

// Layer norm (Ba et al., arXiv 1607.06450): (x - mean) / sqrt(variance + eps) * weight + bias. out may be x.
void layer_norm(const float* x, const float* weight, const float* bias, int64_t n, float eps, float* out) {
  F sum = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) sum += load(x + i);
  float total = sum_lanes(sum);
  for (; i < n; i++) total += x[i];
  const float mean = total / (float)n;
  F squares = {};
  for (i = 0; i + 8 <= n; i += 8) squares = fma(load(x + i) - mean, load(x + i) - mean, squares);
  float rest = sum_lanes(squares);
  for (; i < n; i++) rest += (x[i] - mean) * (x[i] - mean);
  const float scale = 1.0f / std::sqrt(rest / (float)n + eps);
  for (i = 0; i + 8 <= n; i += 8) store(out + i, (load(x + i) - mean) * scale * load(weight + i) + (bias ? load(bias + i) : F{}));
  for (; i < n; i++) out[i] = (x[i] - mean) * scale * weight[i] + (bias ? bias[i] : 0.0f);
}

// erf to 1.5e-7 (Abramowitz and Stegun, 7.1.26).
PG_INLINE F erf(F x) {
  const F magnitude = abs(x), t = splat(1.0f) / fma(magnitude, splat(0.3275911f), splat(1.0f));
  F p = splat(1.061405429f);
  p = fma(p, t, splat(-1.453152027f));
  p = fma(p, t, splat(1.421413741f));
  p = fma(p, t, splat(-0.284496736f));
  p = fma(p, t, splat(0.254829592f));
  const F y = splat(1.0f) - p * t * exp(-(magnitude * magnitude));
  return select(x < F{}, -y, y);
}

// GELU (Hendrycks and Gimpel, arXiv 1606.08415), the exact form: x * (1 + erf(x / sqrt 2)) / 2.
void gelu(const float* x, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const F v = load(x + i);
    store(out + i, v * 0.5f * (erf(v * 0.70710678f) + 1.0f));
  }
  for (; i < n; i++) out[i] = x[i] * 0.5f * (erf(splat(x[i] * 0.70710678f))[0] + 1.0f);
}

// x * sigmoid(1.702 x), which is near GELU.
void quick_gelu(const float* x, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) store(out + i, load(x + i) / (exp(load(x + i) * -1.702f) + 1.0f));
  for (; i < n; i++) out[i] = x[i] / (exp(splat(x[i] * -1.702f))[0] + 1.0f);
}

// GELU's other form, x * (1 + tanh(u)) / 2 with u = sqrt(2 / pi) * (x + 0.044715 x^3), which is x * sigmoid(2 u).
void gelu_tanh(const float* x, int64_t n, float* out) {
  const auto one = [](F v) { return v / (exp(v * fma(v * v, splat(-0.071354816f), splat(-1.5957691f))) + 1.0f); };
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) store(out + i, one(load(x + i)));
  for (; i < n; i++) out[i] = one(splat(x[i]))[0];
}

// gelu(gate) * up
void gelu_gated(const float* gate, const float* up, int64_t n, float* out) {
  gelu_tanh(gate, n, out);
  for (int64_t i = 0; i < n; i++) out[i] *= up[i];
}

}  // namespace PG_NS
}  // namespace pagoda
