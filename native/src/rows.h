// Small functions of one row of values.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace pagoda {

// The mean of `parts` values for each of the n of `out`.
inline void mean_of_parts(const float* in, int64_t parts, int64_t n, float* out) {
  std::copy(in, in + n, out);
  for (int64_t p = 1; p < parts; p++)
    for (int64_t i = 0; i < n; i++) out[i] += in[p * n + i];
  for (int64_t i = 0; i < n; i++) out[i] *= 1.0f / (float)parts;
}

// The square of what is above 0.
inline void relu2(const float* in, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i++) {
    const float x = in[i] > 0 || in[i] != in[i] ? in[i] : 0.0f;  // what is no number stays so
    out[i] = x * x;
  }
}

// function(in[:n]) * in[n:]
inline void gated(void (*function)(const float*, int64_t, float*), const float* in, int64_t n, float* out) {
  function(in, n, out);
  for (int64_t i = 0; i < n; i++) out[i] *= in[n + i];
}

// out = function(out) * x
inline void times_gelu(void (*function)(const float*, int64_t, float*), const float* x, int64_t n, float* out) {
  function(out, n, out);
  for (int64_t i = 0; i < n; i++) out[i] *= x[i];
}

// RMS norm in place, without weights.
inline void norm_plainly(float* x, int64_t n, float eps) {
  float sums[8] = {};
  for (int64_t i = 0; i < n; i++) sums[i % 8] += x[i] * x[i];
  float total = 0.0f;
  for (float each : sums) total += each;
  const float scale = 1.0f / std::sqrt(total / (float)n + eps);
  for (int64_t i = 0; i < n; i++) x[i] *= scale;
}

inline void put_in_order(const std::vector<int32_t>& places, float* row, float* scratch) {
  memcpy(scratch, row, places.size() * sizeof(float));
  for (size_t i = 0; i < places.size(); i++) row[i] = scratch[places[i]];
}

inline void add_scaled(float* out, const float* x, const float* scale, int64_t n) {
  for (int64_t i = 0; i < n; i++) out[i] += x[i] * scale[i];
}

inline void add_to(float* out, const float* x, int64_t n) {
  for (int64_t i = 0; i < n; i++) out[i] += x[i];
}

}  // namespace pagoda
