// What encoders need beside a decoder's kernels: layer norm, GELU, and attention without a cache, over all tokens of a
// request. Keys are taken in segments of kKeys cut at absolute positions and joined in order, so that a query's result
// has the same bits whatever else is in the step.
#pragma once
#include "kernels.h"
#include "wide.h"

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

struct KeySegment {  // keys turned, so that 16 of them lie side by side; places behind the last one are zero
  float *keys, *values;  // [kKeys / 16][dim][16], [kKeys][dim]
  int count, padded;
};

PG_INLINE int key_place(int d, int t, int dim) { return (t / 16 * dim + d) * 16 + t % 16; }

PG_INLINE void take_segment(const EncoderJob& job, int start, KeySegment& s) {
  s.count = job.keys - start < kKeys ? job.keys - start : kKeys;
  s.padded = (s.count + 15) / 16 * 16;
  for (int t = 0; t < s.count; t++) {
    const float *k = job.k + (start + t) * job.stride, *v = job.v + (start + t) * job.stride;
    for (int d = 0; d < job.dim; d++) s.keys[key_place(d, t, job.dim)] = k[d];
    memcpy(s.values + t * job.dim, v, job.dim * sizeof(float));
  }
  for (int d = 0; d < job.dim; d++)
    for (int t = s.count; t < s.padded; t++) s.keys[key_place(d, t, job.dim)] = 0.0f;
}

// N queries over one segment: their running maximum and sum in `tops` and `totals`, weighted values in acc [N][dim].
template <int N>
PG_INLINE void attend_segment(const KeySegment& s, int dim, const float* q, float* scores, float* tops, float* totals, float* acc) {
  for (int t = 0; t < s.padded; t += 16) {
    W sum[N] = {};
    for (int d = 0; d < dim; d++) {
      const W k = load_wide(s.keys + key_place(d, t, dim));
      for (int n = 0; n < N; n++) sum[n] = fma(splat_wide(q[n * dim + d]), k, sum[n]);
    }
    for (int n = 0; n < N; n++) store_wide(scores + n * kKeys + t, sum[n]);
  }
  float keep[N];  // what the values so far are worth under the new maximum
  for (int n = 0; n < N; n++) {
    float* row = scores + n * kKeys;
    for (int t = s.count; t < s.padded; t++) row[t] = -INFINITY;
    F highest = splat(tops[n]);
    for (int t = 0; t < s.padded; t += 8) highest = max(highest, load(row + t));
    const float top = max_lanes(highest);
    F sum = {};
    for (int t = 0; t < s.padded; t += 8) {
      const F e = exp(load(row + t) - top);
      sum += e;
      store(row + t, e);
    }
    keep[n] = exp(splat(tops[n] - top))[0];
    totals[n] = totals[n] * keep[n] + sum_lanes(sum);
    tops[n] = top;
  }
  for (int d = 0; d < dim; d += 16) {
    W sum[N];
    for (int n = 0; n < N; n++) sum[n] = load_wide(acc + n * dim + d) * splat_wide(keep[n]);
    for (int t = 0; t < s.count; t++) {
      const W v = load_wide(s.values + t * dim + d);
      for (int n = 0; n < N; n++) sum[n] = fma(splat_wide(scores[n * kKeys + t]), v, sum[n]);
    }
    for (int n = 0; n < N; n++) store_wide(acc + n * dim + d, sum[n]);
  }
}

void attend_all(const EncoderJob& job, float* scratch) {
  const int dim = job.dim;
  float *q = scratch, *acc = q + kEncoderQueries * dim, *scores = acc + kEncoderQueries * dim;
  KeySegment s{scores + kQueriesAtOnce * kKeys, scores + (kQueriesAtOnce + dim) * kKeys, 0, 0};
  float tops[kEncoderQueries], totals[kEncoderQueries] = {};
  for (int n = 0; n < job.count; n++) {
    tops[n] = -INFINITY;
    for (int d = 0; d < dim; d++) q[n * dim + d] = job.q[n * job.stride + d] * job.scale;
  }
  memset(acc, 0, job.count * dim * sizeof(float));
  for (int start = 0; start < job.keys; start += kKeys) {
    take_segment(job, start, s);
    int n = 0;
    for (; n + kQueriesAtOnce <= job.count; n += kQueriesAtOnce)
      attend_segment<kQueriesAtOnce>(s, dim, q + n * dim, scores, tops + n, totals + n, acc + n * dim);
    for (; n + 2 <= job.count; n += 2) attend_segment<2>(s, dim, q + n * dim, scores, tops + n, totals + n, acc + n * dim);
    for (; n < job.count; n++) attend_segment<1>(s, dim, q + n * dim, scores, tops + n, totals + n, acc + n * dim);
  }
  for (int n = 0; n < job.count; n++)
    for (int d = 0; d < dim; d += 8) store(job.out + n * job.out_stride + d, load(acc + n * dim + d) * (1.0f / totals[n]));
}

}  // namespace PG_NS
}  // namespace pagoda
