// Attention over the paged cache. Segments of 512 tokens are cut at absolute positions; within one: scores of all
// blocks, maximum, exponents, weighted sum of values; segments are joined in order. A query's result therefore has the
// same bits in a prompt chunk, in a batch and alone.
#pragma once
#include "kernels.h"
#include "vec.h"

namespace pagoda {
namespace PG_NS {

template <bool Int8> struct KvBlock {  // of one head
  KvBlock(const KvCache& c, const uint8_t* at)
      : keys(at), values(at + c.values() * (Int8 ? 1 : 2)),
        key_scales((const uint16_t*)(at + 2 * c.values())), value_scales(key_scales + c.scales()) {}
  const uint8_t *keys, *values;
  const uint16_t *key_scales, *value_scales;  // in 8 bits only
};

template <bool Int8> PG_INLINE F load_kv(const uint8_t* p, int i) {
  if constexpr (Int8) return load_i8(p + i);
  else return load_f16((const uint16_t*)p + i);
}

// Scores of N queries [N][dim] against the 16 keys of a block [dim][16].
template <int N, bool Int8> PG_INLINE void block_scores(const float* q, const KvBlock<Int8>& block, int dim, float* scores) {
  F acc[N][2] = {};
  for (int from = 0; from < dim; from += kKvGroup) {
    const int end = from + kKvGroup < dim ? from + kKvGroup : dim;
    F whole[N][2];
    if constexpr (Int8)
      for (int n = 0; n < N; n++) whole[n][0] = acc[n][0], whole[n][1] = acc[n][1], acc[n][0] = acc[n][1] = F{};
    for (int d = from; d < end; d++) {
      F k0 = load_kv<Int8>(block.keys, d * kTokens), k1 = load_kv<Int8>(block.keys, d * kTokens + 8);
      for (int n = 0; n < N; n++) {
        F x = splat(q[n * dim + d]);
        acc[n][0] = fma(x, k0, acc[n][0]), acc[n][1] = fma(x, k1, acc[n][1]);
      }
    }
    if constexpr (Int8) {
      const uint16_t* scales = block.key_scales + from / kKvGroup * kTokens;
      F s0 = load_f16(scales), s1 = load_f16(scales + 8);
      for (int n = 0; n < N; n++) acc[n][0] = fma(acc[n][0], s0, whole[n][0]), acc[n][1] = fma(acc[n][1], s1, whole[n][1]);
    }
  }
  for (int n = 0; n < N; n++) store(scores + n * kSegment, acc[n][0]), store(scores + n * kSegment + 8, acc[n][1]);
}

// acc [N][dim] += weights [N] of `count` tokens times their values [count][dim], in the order of the tokens.
template <int N, bool Int8>
PG_INLINE void block_values(const float* weights, const KvBlock<Int8>& block, int dim, int count, float* acc) {
  constexpr int stride = Int8 ? kTokens : kSegment;
  float scaled[N * kTokens];
  for (int d = 0; d < dim; d += 16) {
    if constexpr (Int8) {
      if (d % kKvGroup == 0) {
        const uint16_t* scales = block.value_scales + d / kKvGroup * kTokens;
        F s0 = load_f16(scales), s1 = load_f16(scales + 8);
        for (int n = 0; n < N; n++) {
          store(scaled + n * kTokens, load(weights + n * kSegment) * s0);
          store(scaled + n * kTokens + 8, load(weights + n * kSegment + 8) * s1);
        }
      }
    }
    const float* w = Int8 ? scaled : weights;
    F sum[N][2];
    for (int n = 0; n < N; n++) sum[n][0] = load(acc + n * dim + d), sum[n][1] = load(acc + n * dim + d + 8);
    for (int t = 0; t < count; t++) {
      F v0 = load_kv<Int8>(block.values, t * dim + d), v1 = load_kv<Int8>(block.values, t * dim + d + 8);
      for (int n = 0; n < N; n++) {
        F x = splat(w[n * stride + t]);
        sum[n][0] = fma(x, v0, sum[n][0]), sum[n][1] = fma(x, v1, sum[n][1]);
      }
    }
    for (int n = 0; n < N; n++) store(acc + n * dim + d, sum[n][0]), store(acc + n * dim + d + 8, sum[n][1]);
  }
}

// Scores [from, count) to weights: those in front of `low`, at `high` and behind become 0. Returns maximum and sum.
// `from` is a multiple of 8 and no number of its own: what lies in front of it would be 0 and change nothing.
PG_INLINE void soften(float* s, int from, int count, int low, int high, float& top, float& total) {
  for (int i = from; i < low; i++) s[i] = -INFINITY;
  for (int i = high; i < count; i++) s[i] = -INFINITY;
  F m = load(s + from);
  for (int i = from + 8; i < count; i += 8) m = max(m, load(s + i));
  top = max_lanes(m);
  F sum = {};
  for (int i = from; i < count; i += 8) {
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

// The hardware does not see from one block to the next. Into the second level: the values are needed later.
PG_INLINE void prefetch(const KvCache& c, const uint8_t* block) {
  for (int64_t i = 0; i < c.stride(); i += 64) __builtin_prefetch(block + i, 0, 2);
}

// Positions that query vector n sees: [first, last].
PG_INLINE int last_seen(const AttentionJob& job, int n) { return job.position + n / job.group; }
PG_INLINE int first_seen(const AttentionJob& job, int n) {
  const int first = last_seen(job, n) + 1 - job.window;
  return first > 0 ? first : 0;
}

// The segment [start, start + 512) for N consecutive query vectors, from `first`.
template <int N, bool Int8>
PG_INLINE void segment(const AttentionJob& job, int first, int start, const float* q, float* scores, float* partials) {
  const KvCache& cache = *job.cache;
  const int dim = cache.head_dim, width = partial_width(dim);
  const int last = last_seen(job, first + N - 1), least = first_seen(job, first);  // of all these queries
  for (int n = 0; n < N; n++) partials[(first + n) * width + dim + 1] = 0.0f;
  if (start > last || least >= start + kSegment) return;
  const int end = last + 1 < start + kSegment ? last + 1 - start : kSegment;
  const int blocks = (end + kTokens - 1) / kTokens, skipped = least > start ? (least - start) / kTokens : 0;
  const int32_t* table = job.table + start / kTokens;
  for (int b = skipped; b < blocks; b++) {
    if (first == 0 && b + 1 < blocks) prefetch(cache, cache.at(job.layer, table[b + 1], job.kv_head));
    block_scores<N, Int8>(q + first * dim, {cache, cache.at(job.layer, table[b], job.kv_head)}, dim, scores + b * kTokens);
  }
  float acc[N * kMaxHeadDim];
  memset(acc, 0, N * dim * sizeof(float));
  for (int n = 0; n < N; n++) {
    const int low = first_seen(job, first + n) - start, high = last_seen(job, first + n) + 1 - start;
    const int from = skipped * kTokens, count = blocks * kTokens;
    float *tail = partials + (first + n) * width + dim, *own = scores + n * kSegment;
    if (high > from && low < count) soften(own, from, count, low, high, tail[0], tail[1]);
    else memset(own + from, 0, (count - from) * sizeof(float));
  }
  for (int b = skipped; b < blocks; b++) {
    const int count = end - b * kTokens < kTokens ? end - b * kTokens : kTokens;
    block_values<N, Int8>(scores + b * kTokens, {cache, cache.at(job.layer, table[b], job.kv_head)}, dim, count, acc);
  }
  for (int n = 0; n < N; n++) memcpy(partials + (first + n) * width, acc + n * dim, dim * sizeof(float));
}

template <bool Int8>
PG_INLINE void segment_of_all(const AttentionJob& job, int start, const float* q, float* scores, float* partials) {
  const int queries = job.tokens * job.group;
  for (int n = 0; n < queries;) {
    if (queries - n >= 4) segment<4, Int8>(job, n, start, q, scores, partials), n += 4;
    else if (queries - n == 3) segment<3, Int8>(job, n, start, q, scores, partials), n += 3;
    else if (queries - n == 2) segment<2, Int8>(job, n, start, q, scores, partials), n += 2;
    else segment<1, Int8>(job, n, start, q, scores, partials), n += 1;
  }
}

void one_segment(const AttentionJob& job, int start, const float* q, float* scores, float* partials) {
  job.cache->int8 ? segment_of_all<true>(job, start, q, scores, partials) : segment_of_all<false>(job, start, q, scores, partials);
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
  for (int start = first_seen(job, 0) / kSegment * kSegment; start < job.position + job.tokens; start += kSegment) {
    one_segment(job, start, q, scores, partials);
    join_segment(job, partials, running, acc);
  }
  write_out(job, running, acc);
}

void attention_segment(const AttentionJob& job, int index, float* partials, float* scratch) {
  float *q = scratch, *scores = q + kQueryVectors * job.cache->head_dim;
  scale_queries(job, q);
  one_segment(job, index * kSegment, q, scores, partials);
}

void attention_join(const AttentionJob& job, const float* partials, int64_t stride, int segments, float* scratch) {
  Running running[kQueryVectors] = {};
  for (int i = 0; i < segments; i++) join_segment(job, partials + i * stride, running, scratch);
  write_out(job, running, scratch);
}

// Up to 32 values to codes -127 .. 127 times a scale, which is returned. A NaN or infinity makes the scale NaN.
PG_INLINE uint16_t quantize_kv(const float* x, int n, int8_t* codes) {
  F top = {}, bad = {};
  for (int i = 0; i < n; i += 8) {
    F v = load(x + i);
    top = max(top, abs(v)), bad += v - v;
  }
  uint16_t half[8];
  store_f16(half, splat(max_lanes(top) / 127.0f + sum_lanes(bad)));
  const float scale = load_f16(half)[0], inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
  for (int i = 0; i < n; i += 8) {
    I code = to_int(min(max(load(x + i) * inverse, splat(-127.0f)), splat(127.0f)));
    for (int j = 0; j < 8; j++) codes[i + j] = (int8_t)code[j];
  }
  return half[0];
}

PG_INLINE void store_kv_int8(const KvCache& cache, uint8_t* at, int offset, const float* k, const float* v) {
  const int dim = cache.head_dim;
  uint8_t* values = at + cache.values() + offset * dim;
  uint16_t *key_scales = (uint16_t*)(at + 2 * cache.values()), *value_scales = key_scales + cache.scales();
  for (int d = 0, place = offset; d < dim; d += kKvGroup, place += kTokens) {
    const int n = dim - d < kKvGroup ? dim - d : kKvGroup;
    int8_t codes[kKvGroup];
    key_scales[place] = quantize_kv(k + d, n, codes);
    for (int i = 0; i < n; i++) at[(d + i) * kTokens + offset] = (uint8_t)codes[i];
    value_scales[place] = quantize_kv(v + d, n, (int8_t*)values + d);
  }
}

void store_kv(const KvCache& cache, int layer, int64_t block, int head, int offset, const float* k, const float* v) {
  const int dim = cache.head_dim;
  uint8_t* at = cache.at(layer, block, head);
  if (cache.int8) return store_kv_int8(cache, at, offset, k, v);
  uint16_t *keys = (uint16_t*)at, *values = keys + cache.values() + offset * dim;
  uint16_t half[8];
  for (int d = 0; d < dim; d += 8) {
    store_f16(half, load(k + d));
    for (int i = 0; i < 8; i++) keys[(d + i) * kTokens + offset] = half[i];
    store_f16(values + d, load(v + d));
  }
}

}  // namespace PG_NS
}  // namespace pagoda
