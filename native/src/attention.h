// Attention over the paged cache. Segments of 512 tokens are cut at absolute positions; within one: scores of all
// blocks, maximum, exponents, weighted sum of values; segments are joined in order. A query's result therefore has the
// same bits in a prompt chunk, in a batch and alone.
#pragma once
#include "kernels.h"
#include "vec.h"

namespace pagoda {
namespace PG_NS {

// Scores of N queries [N][dim] against the 16 keys of a block [dim][16].
template <int N> PG_INLINE void block_scores(const float* q, const uint16_t* keys, int dim, float* scores) {
  F acc[N][2] = {};
  for (int d = 0; d < dim; d++) {
    F k0 = load_f16(keys + d * kTokens), k1 = load_f16(keys + d * kTokens + 8);
    for (int n = 0; n < N; n++) {
      F x = splat(q[n * dim + d]);
      acc[n][0] = fma(x, k0, acc[n][0]), acc[n][1] = fma(x, k1, acc[n][1]);
    }
  }
  for (int n = 0; n < N; n++) store(scores + n * kSegment, acc[n][0]), store(scores + n * kSegment + 8, acc[n][1]);
}

// acc [N][dim] += weights [N] of `count` tokens times their values [count][dim], in the order of the tokens.
template <int N> PG_INLINE void block_values(const float* weights, const uint16_t* values, int dim, int count, float* acc) {
  for (int d = 0; d < dim; d += 16) {
    F sum[N][2];
    for (int n = 0; n < N; n++) sum[n][0] = load(acc + n * dim + d), sum[n][1] = load(acc + n * dim + d + 8);
    for (int t = 0; t < count; t++) {
      F v0 = load_f16(values + t * dim + d), v1 = load_f16(values + t * dim + d + 8);
      for (int n = 0; n < N; n++) {
        F w = splat(weights[n * kSegment + t]);
        sum[n][0] = fma(w, v0, sum[n][0]), sum[n][1] = fma(w, v1, sum[n][1]);
      }
    }
    for (int n = 0; n < N; n++) store(acc + n * dim + d, sum[n][0]), store(acc + n * dim + d + 8, sum[n][1]);
  }
}

// Scores to weights: those at `limit` and behind become 0. Returns maximum and sum.
PG_INLINE void soften(float* s, int count, int limit, float& top, float& total) {
  for (int i = limit; i < count; i++) s[i] = -INFINITY;
  F m = load(s);
  for (int i = 8; i < count; i += 8) m = max(m, load(s + i));
  top = max_lanes(m);
  F sum = {};
  for (int i = 0; i < count; i += 8) {
    F e = exp(load(s + i) - top);
    sum += e;
    store(s + i, e);
  }
  total = sum_lanes(sum);
}

struct Running {  // of one query, over the segments so far
  float top, total;
};

// Join the result of a segment to what is there.
PG_INLINE void join(Running& r, float* acc, const float* part, int dim, float top, float total) {
  if (r.total == 0.0f) {
    r = {top, total};
    memcpy(acc, part, dim * sizeof(float));
    return;
  }
  float highest = r.top > top ? r.top : top;
  const float below[8] = {r.top - highest, top - highest};
  F scale = exp(load(below));
  r = {highest, r.total * scale[0] + total * scale[1]};
  for (int d = 0; d < dim; d += 8) store(acc + d, load(acc + d) * scale[0] + load(part + d) * scale[1]);
}

// What one segment gives to a query: weighted values [dim], then their maximum and total (0: nothing to attend).
constexpr int partial_width(int dim) { return dim + 2; }

// The segment [start, start + 512) for N consecutive query vectors, from `first`.
template <int N>
PG_INLINE void segment(const AttentionJob& job, int first, int start, const float* q, float* scores, float* partials) {
  const int dim = job.cache->head_dim, width = partial_width(dim);
  const int last = job.position + (first + N - 1) / job.group;  // position of the last of these queries
  for (int n = 0; n < N; n++) partials[(first + n) * width + dim + 1] = 0.0f;
  if (start > last) return;
  const int end = last + 1 < start + kSegment ? last + 1 : start + kSegment;
  const int blocks = (end - start + kTokens - 1) / kTokens;
  const int32_t* table = job.table + start / kTokens;
  for (int b = 0; b < blocks; b++)
    block_scores<N>(q + first * dim, job.cache->at(job.layer, table[b], job.kv_head), dim, scores + b * kTokens);
  float acc[N * kMaxHeadDim];
  memset(acc, 0, N * dim * sizeof(float));
  for (int n = 0; n < N; n++) {
    const int limit = job.position + (first + n) / job.group + 1 - start;
    float* tail = partials + (first + n) * width + dim;
    if (limit > 0) soften(scores + n * kSegment, blocks * kTokens, limit, tail[0], tail[1]);
    else memset(scores + n * kSegment, 0, blocks * kTokens * sizeof(float));
  }
  for (int b = 0; b < blocks; b++) {
    const int count = end - start - b * kTokens < kTokens ? end - start - b * kTokens : kTokens;
    const uint16_t* block = job.cache->at(job.layer, table[b], job.kv_head);
    block_values<N>(scores + b * kTokens, block + kTokens * dim, dim, count, acc);
  }
  for (int n = 0; n < N; n++) memcpy(partials + (first + n) * width, acc + n * dim, dim * sizeof(float));
}

PG_INLINE void segment_of_all(const AttentionJob& job, int start, const float* q, float* scores, float* partials) {
  const int queries = job.tokens * job.group;
  for (int n = 0; n < queries;) {
    if (queries - n >= 4) segment<4>(job, n, start, q, scores, partials), n += 4;
    else if (queries - n == 3) segment<3>(job, n, start, q, scores, partials), n += 3;
    else if (queries - n == 2) segment<2>(job, n, start, q, scores, partials), n += 2;
    else segment<1>(job, n, start, q, scores, partials), n += 1;
  }
}

PG_INLINE void scale_queries(const AttentionJob& job, float* q) {
  const int dim = job.cache->head_dim;
  for (int n = 0; n < job.tokens * job.group; n++)
    for (int d = 0; d < dim; d += 8)
      store(q + n * dim + d, load(job.q + n / job.group * job.q_stride + n % job.group * dim + d) * job.scale);
}

PG_INLINE void join_segment(const AttentionJob& job, const float* partials, Running* running, float* acc) {
  const int dim = job.cache->head_dim, width = partial_width(dim);
  for (int n = 0; n < job.tokens * job.group; n++) {
    const float *part = partials + n * width, top = part[dim], total = part[dim + 1];
    if (total > 0.0f || total != total) join(running[n], acc + n * dim, part, dim, top, total);
  }
}

PG_INLINE void write_out(const AttentionJob& job, const Running* running, const float* acc) {
  const int dim = job.cache->head_dim;
  for (int n = 0; n < job.tokens * job.group; n++) {
    float* to = job.out + n / job.group * job.out_stride + n % job.group * dim;
    const float scale = 1.0f / running[n].total;
    for (int d = 0; d < dim; d += 8) store(to + d, load(acc + n * dim + d) * scale);
  }
}

void attention(const AttentionJob& job, float* scratch) {
  const int dim = job.cache->head_dim;
  float *q = scratch, *acc = q + kQueryVectors * dim, *partials = acc + kQueryVectors * dim;
  float* scores = partials + kQueryVectors * partial_width(dim);
  Running running[kQueryVectors] = {};
  scale_queries(job, q);
  for (int start = 0; start <= job.position + job.tokens - 1; start += kSegment) {
    segment_of_all(job, start, q, scores, partials);
    join_segment(job, partials, running, acc);
  }
  write_out(job, running, acc);
}

void attention_segment(const AttentionJob& job, int index, float* partials, float* scratch) {
  float *q = scratch, *scores = q + kQueryVectors * job.cache->head_dim;
  scale_queries(job, q);
  segment_of_all(job, index * kSegment, q, scores, partials);
}

void attention_join(const AttentionJob& job, const float* partials, int64_t stride, int segments, float* scratch) {
  Running running[kQueryVectors] = {};
  for (int i = 0; i < segments; i++) join_segment(job, partials + i * stride, running, scratch);
  write_out(job, running, scratch);
}

void store_kv(const KvCache& cache, int layer, int64_t block, int head, int offset, const float* k, const float* v) {
  const int dim = cache.head_dim;
  uint16_t *keys = cache.at(layer, block, head), *values = keys + kTokens * dim + offset * dim;
  uint16_t half[8];
  for (int d = 0; d < dim; d += 8) {
    store_f16(half, load(k + d));
    for (int i = 0; i < 8; i++) keys[(d + i) * kTokens + offset] = half[i];
    store_f16(values + d, load(v + d));
  }
}

}  // namespace PG_NS
}  // namespace pagoda
