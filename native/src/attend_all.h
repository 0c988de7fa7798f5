// Attention without a cache, over all tokens of a request: that of encoders. Keys are taken in segments of kKeys cut at
// absolute positions and joined in order, so that a query's result has the same bits whatever else is in the step.
#pragma once
#include "kernels.h"
#include "wide.h"

namespace pagoda {
namespace PG_NS {

// Keys turned, so that 16 of them lie side by side, and values; with bf16 a float's bits hold a pair: two values of a key,
// the values of two tokens. Places behind the last token are zero.
struct KeySegment {
  float *keys, *values;  // [kKeys / 16][dim / kHalves][16], [kKeys / kHalves][dim]
  int count, padded;
};

PG_INLINE float& key_at(const KeySegment& s, int t, int d, int width) { return s.keys[(t / 16 * width + d) * 16 + t % 16]; }

PG_INLINE void take_segment(const EncoderJob& job, int start, KeySegment& s, float* row) {
  const int width = job.dim / kHalves;
  s.count = job.keys - start < kKeys ? job.keys - start : kKeys;
  s.padded = (s.count + 15) / 16 * 16;
  for (int t = 0; t < s.count; t++) {
    const float* from = job.k + (start + t) * job.stride;
    if constexpr (kHalves > 1) to_halves(from, job.dim, row), from = row;
    for (int d = 0; d < width; d++) key_at(s, t, d, width) = from[d];
  }
  for (int t = s.count; t < s.padded; t++)
    for (int d = 0; d < width; d++) key_at(s, t, d, width) = 0.0f;
  for (int t = 0; t < s.count; t += kHalves) {
    const float* v = job.v + (start + t) * job.stride;
    pair_rows(v, t + 1 < s.count ? v + job.stride : nullptr, job.dim, s.values + t / kHalves * job.dim);
  }
}

// N queries over one segment: their running maximum and sum in `tops` and `totals`, weighted values in acc [N][dim].
// Query n, which is `ahead + n` places behind the first key, sees those less than `window` places away.
template <int N>
PG_INLINE void attend_segment(const KeySegment& s, int dim, int64_t ahead, int64_t window, const float* q, float* scores, float* tops, float* totals, float* acc) {
  const int width = dim / kHalves;
  for (int t = 0; t < s.padded; t += 16) {
    W sum[N] = {};
    for (int d = 0; d < width; d++) {
      const auto k = load_slots(&key_at(s, t, d, width));
      for (int n = 0; n < N; n++) sum[n] = fma(splat_slots(q[n * dim + d]), k, sum[n]);
    }
    for (int n = 0; n < N; n++) store_wide(scores + n * kKeys + t, sum[n]);
  }
  float keep[N];  // what the values so far are worth under the new maximum
  for (int n = 0; n < N; n++) {
    float* row = scores + n * kKeys;
    for (int t = s.count; t < s.padded; t++) row[t] = -INFINITY;
    for (int t = 0; window < INT32_MAX && t < s.count; t++)
      if (ahead + n - t >= window || t - ahead - n >= window) row[t] = -INFINITY;
    F highest = splat(tops[n]);
    for (int t = 0; t < s.padded; t += 8) highest = max(highest, load(row + t));
    const float top = max_lanes(highest);
    keep[n] = exp(splat(tops[n] - top))[0];
    totals[n] = totals[n] * keep[n] + exponents(row, s.padded, top, row);
    tops[n] = top;
  }
  for (int d = 0; d < dim; d += 16) {
    W sum[N];
    for (int n = 0; n < N; n++) sum[n] = load_wide(acc + n * dim + d) * splat_wide(keep[n]);
    for (int t = 0; t < s.count; t += kHalves) {
      const auto v = load_slots(s.values + t / kHalves * dim + d);
      for (int n = 0; n < N; n++) sum[n] = fma(splat_slots(scores[n * kKeys + t / kHalves]), v, sum[n]);
    }
    for (int n = 0; n < N; n++) store_wide(acc + n * dim + d, sum[n]);
  }
}

void attend_all(const EncoderJob& job, float* scratch) {
  const int dim = job.dim;
  float *q = scratch, *acc = q + kEncoderQueries * dim, *scores = acc + kEncoderQueries * dim;
  KeySegment s{scores + kQueriesAtOnce * kKeys, scores + (kQueriesAtOnce + dim) * kKeys, 0, 0};
  float* row = s.values + kKeys * dim;
  float tops[kEncoderQueries], totals[kEncoderQueries] = {};
  for (int n = 0; n < job.count; n++) {
    tops[n] = -1e30f;  // a number, also once it is scaled: a query may see nothing of the first segments
    for (int d = 0; d < dim; d++) q[n * dim + d] = job.q[n * job.stride + d] * job.scale;
    to_halves(q + n * dim, dim, q + n * dim);
  }
  memset(acc, 0, job.count * dim * sizeof(float));
  for (int start = 0; start < job.keys; start += kKeys) {
    const int64_t ahead = job.from - start, reach = job.window;
    if (ahead - reach >= kKeys - 1 || ahead + job.count + reach < 2) continue;  // no query sees a key of these
    take_segment(job, start, s, row);
    int n = 0;
    for (; n + kQueriesAtOnce <= job.count; n += kQueriesAtOnce)
      attend_segment<kQueriesAtOnce>(s, dim, ahead + n, reach, q + n * dim, scores, tops + n, totals + n, acc + n * dim);
    for (; n + 2 <= job.count; n += 2) attend_segment<2>(s, dim, ahead + n, reach, q + n * dim, scores, tops + n, totals + n, acc + n * dim);
    for (; n < job.count; n++) attend_segment<1>(s, dim, ahead + n, reach, q + n * dim, scores, tops + n, totals + n, acc + n * dim);
  }
  for (int n = 0; n < job.count; n++)
    for (int d = 0; d < dim; d += 8) store(job.out + n * job.out_stride + d, load(acc + n * dim + d) * (1.0f / totals[n]));
}

}  // namespace PG_NS
}  // namespace pagoda
