// Attention over the paged cache. Segments of 512 tokens are cut at absolute positions; within one: scores of all
// blocks, maximum, exponents, weighted sum of values; segments are joined in order. A query's result therefore has the
// same bits in a prompt chunk, in a batch and alone.
#pragma once
#include "kernels.h"
#include "wide.h"

namespace pagoda {
namespace PG_NS {

template <bool Int8> struct KvBlock {  // of one head
  KvBlock(const KvCache& c, const uint8_t* at)
      : keys(at), values(at + c.values() * (Int8 ? 1 : 2)),
        key_scales((const uint16_t*)(at + c.both() * c.values())), value_scales(key_scales + c.scales()) {}
  const uint8_t *keys, *values;
  const uint16_t *key_scales, *value_scales;  // in 8 bits only
};

// Values that a multiply-add takes at once: 16 bits may go in pairs.
template <bool Int8> constexpr int kTogether = Int8 ? 1 : kHalves;

template <bool Int8> PG_INLINE auto load_kv(const uint8_t* p, int i, int part) {
  if constexpr (Int8) return load_part_i8(p + i, part);
  else return load_halves((const uint16_t*)p + i, part);
}

template <bool Int8> PG_INLINE auto splat_query(float x) {
  if constexpr (Int8) return splat_part(x);
  else return splat_halves(x);
}

// sums[n][b] += x(n) * k(b, part of 16). Only the fewer of both are held, and registers are left for all sums.
template <int N, int B, typename X, typename K> PG_INLINE void multiply_add(X x, K k, W (&sums)[N][B]) {
  if constexpr (N < B * kParts) {
    decltype(x(0)) held[N];
    for (int n = 0; n < N; n++) held[n] = x(n);
    for (int b = 0; b < B; b++)
      for (int i = 0; i < kParts; i++) {
        const auto each = k(b, i);
        for (int n = 0; n < N; n++) part(sums[n][b], i) = fma(held[n], each, part(sums[n][b], i));
      }
  } else {
    decltype(k(0, 0)) held[B][kParts];
    for (int b = 0; b < B; b++)
      for (int i = 0; i < kParts; i++) held[b][i] = k(b, i);
    for (int n = 0; n < N; n++) {
      const auto each = x(n);
      for (int b = 0; b < B; b++)
        for (int i = 0; i < kParts; i++) part(sums[n][b], i) = fma(each, held[b][i], part(sums[n][b], i));
    }
  }
}

// Scores of N queries [N][dim] against the 16 keys [dim][16] of each of B blocks. Meanwhile the first bytes of `next` are
// fetched, a line for each value of a head: the hardware does not see from one block to the next.
template <int N, int B, bool Int8>
PG_INLINE void block_scores(const float* q, const KvBlock<Int8> (&blocks)[B], int dim, const uint8_t* const (&next)[B],
                            int64_t bytes, float* scores) {
  constexpr int pair = kTogether<Int8>;
  W acc[N][B] = {};
  for (int from = 0; from < dim; from += kKvGroup) {
    const int end = from + kKvGroup < dim ? from + kKvGroup : dim;
    W whole[N][B];
    if constexpr (Int8)
      for (int n = 0; n < N; n++)
        for (int b = 0; b < B; b++) whole[n][b] = acc[n][b], acc[n][b] = W{};
    for (int d = from; d < end; d += pair) {
      for (int line = d * 64; line < (d + pair) * 64 && line < bytes; line += 64)
        for (int b = 0; b < B; b++) __builtin_prefetch(next[b] + line, 0, 2);
      multiply_add<N, B>([&](int n) { return splat_query<Int8>(q[n * dim + d / pair]); },
                         [&](int b, int i) { return load_kv<Int8>(blocks[b].keys, d * kTokens, i); }, acc);
    }
    if constexpr (Int8)
      for (int b = 0; b < B; b++) {
        const W scale = load_wide_f16(blocks[b].key_scales + from / kKvGroup * kTokens);
        for (int n = 0; n < N; n++) acc[n][b] = fma(acc[n][b], scale, whole[n][b]);
      }
  }
  for (int n = 0; n < N; n++)
    for (int b = 0; b < B; b++) store_wide(scores + n * kSegment + b * kTokens, acc[n][b]);
}

// sums [N][C] of 16 += weights [N] of `count` tokens times their values from column d, in the order of the tokens.
template <int N, int C, bool Int8>
PG_INLINE void block_values(const float* weights, const KvBlock<Int8>& block, int dim, int d, int count, W (&sums)[N][C]) {
  constexpr int stride = Int8 ? kTokens : kSegment, pair = kTogether<Int8>;
  float scaled[N * kTokens];
  if constexpr (Int8) {
    const W scale = load_wide_f16(block.value_scales + d / kKvGroup * kTokens);
    for (int n = 0; n < N; n++) store_wide(scaled + n * kTokens, load_wide(weights + n * kSegment) * scale);
  }
  const float* w = Int8 ? scaled : weights;
  const auto add = [&](int t, auto loaded) __attribute__((always_inline)) {
    multiply_add<N, C>([&](int n) { return splat_query<Int8>(w[n * stride + t / pair]); },
                       [&](int c, int i) { return loaded(block.values, t * dim + pair * (d + 16 * c), i); }, sums);
  };
  int t = 0;
  const auto both = [](const uint8_t* p, int i, int part) __attribute__((always_inline)) { return load_kv<Int8>(p, i, part); };
  const auto one = [](const uint8_t* p, int i, int part) __attribute__((always_inline)) { return first_half(load_kv<Int8>(p, i, part)); };
  for (; t + pair <= count; t += pair) add(t, both);
  if (t < count) add(t, one);
}

// Scores [from, count) to weights, packed as values are multiplied: those in front of `low`, at `high` and behind become 0.
// Returns maximum and sum.
// `from` and `count` are multiples of 16. What lies in front of `from` would be 0 and change nothing.
PG_INLINE void soften(float* s, int from, int count, int low, int high, float& top, float& total) {
  for (int i = from; i < low; i++) s[i] = -INFINITY;
  for (int i = high; i < count; i++) s[i] = -INFINITY;
  F m = load(s + from);
  for (int i = from + 8; i < count; i += 8) m = max(m, load(s + i));
  top = max_lanes(m);
  total = exponents(s + from, count - from, top, s + from / kHalves);
}

// x = cap * tanh(x / cap), by tanh(u) = 1 - 2 / (e^2u + 1). NaN stays.
void soft_cap(float* x, int64_t n, float cap) {
  const auto one = [&](F v) {
    const F capped = splat(cap) - splat(2.0f * cap) / (exp(v * (2.0f / cap)) + 1.0f);
    return select(v == v, capped, v);
  };
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) store(x + i, one(load(x + i)));
  for (; i < n; i++) x[i] = one(splat(x[i]))[0];
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

// Positions that query vector n sees: [first, last].
PG_INLINE int last_seen(const AttentionJob& job, int n) {
  return job.last_seen ? job.last_seen[n / job.group] : job.position + n / job.group;
}
PG_INLINE int first_seen(const AttentionJob& job, int n) {
  const int first = job.position + n / job.group + 1 - job.window;
  return first > 0 ? first : 0;
}

// Blocks of the segment that some of the queries see, and where it ends.
struct Seen {
  int first, last, tokens;  // blocks [first, last) of the segment, its tokens up to the last one seen
};

template <int N, int B, bool Int8>
PG_INLINE int scores_of(const AttentionJob& job, const int32_t* table, Seen seen, int b, bool fetch, const float* q, float* scores) {
  const KvCache& cache = *job.cache;
  const int next_head = table == job.table && job.kv_head + 1 < cache.heads;  // lies behind this one, and its job comes next
  const auto at = [&](int i) {
    const bool here = i < seen.last;
    const int last = seen.last - 1, ahead = seen.first + i - seen.last;
    return cache.at(job.layer, table[here ? i : ahead < last ? ahead : last], job.kv_head + (here ? 0 : next_head));
  };
  const auto block = [&](int i) { return KvBlock<Int8>(cache, at(i)); };
  const int64_t bytes = fetch ? cache.stride() : 0;
  for (; b + B <= seen.last; b += B) {
    float* to = scores + b * kTokens;
    if constexpr (B == 1) block_scores<N, 1, Int8>(q, {block(b)}, cache.head_dim, {at(b + 1)}, bytes, to);
    if constexpr (B == 2)
      block_scores<N, 2, Int8>(q, {block(b), block(b + 1)}, cache.head_dim, {at(b + 2), at(b + 3)}, bytes, to);
    if constexpr (B == 4)
      block_scores<N, 4, Int8>(q, {block(b), block(b + 1), block(b + 2), block(b + 3)}, cache.head_dim,
                               {at(b + 4), at(b + 5), at(b + 6), at(b + 7)}, bytes, to);
  }
  return b;
}

template <int N, int C, bool Int8>
PG_INLINE int values_of(const AttentionJob& job, const int32_t* table, Seen seen, int d, const float* weights, float* partials) {
  const KvCache& cache = *job.cache;
  const int dim = cache.head_dim;
  for (; d + 16 * C <= dim; d += 16 * C) {
    W sums[N][C] = {};
    for (int b = seen.first; b < seen.last; b++) {
      const int count = seen.tokens - b * kTokens < kTokens ? seen.tokens - b * kTokens : kTokens;
      block_values<N, C, Int8>(weights + b * kTokens / kTogether<Int8>, {cache, cache.at(job.layer, table[b], job.kv_head)}, dim, d, count, sums);
    }
    for (int n = 0; n < N; n++)
      for (int c = 0; c < C; c++) store_wide(partials + n * partial_width(dim) + d + 16 * c, sums[n][c]);
  }
  return d;
}

// The first `count` values of a column of keys, and zeros: what lies behind may be of another request, and no number.
template <bool Int8> PG_INLINE W load_first(const uint8_t* keys, int column, int count) {
  constexpr int bytes = Int8 ? 1 : 2;
  uint8_t first[kTokens * bytes] = {};
  memcpy(first, keys + (int64_t)column * kTokens * bytes, count * bytes);
  if constexpr (Int8) return load_wide_i8(first);
  else return load_wide_f16((const uint16_t*)first);
}

// The same of values that are a part of the keys: the lanes are tokens, and come together behind the last block.
template <int N, int C, bool Int8>
PG_INLINE void key_values_of(const AttentionJob& job, const int32_t* table, Seen seen, const float* weights, float* partials) {
  const KvCache& cache = *job.cache;
  const int size = cache.value_dim();
  for (int d = 0; d < size; d += C) {
    W sums[N][C] = {};
    for (int b = seen.first; b < seen.last; b++) {
      const KvBlock<Int8> block(cache, cache.at(job.layer, table[b], job.kv_head));
      const int column = cache.turned + d, count = seen.tokens - b * kTokens;
      W keys[C];
      for (int c = 0; c < C; c++) {
        if (count < kTokens) keys[c] = load_first<Int8>(block.keys, column + c, count);
        else if constexpr (Int8) keys[c] = load_wide_i8(block.keys + (column + c) * kTokens);
        else keys[c] = load_wide_f16((const uint16_t*)block.keys + (column + c) * kTokens);
      }
      for (int n = 0; n < N; n++) {
        W weight = load_wide(weights + n * kSegment + b * kTokens);
        if constexpr (Int8) weight = weight * load_wide_f16(block.key_scales + column / kKvGroup * kTokens);
        for (int c = 0; c < C; c++) sums[n][c] = fma(weight, keys[c], sums[n][c]);
      }
    }
    for (int n = 0; n < N; n++)
      for (int c = 0; c < C; c++) {
        float lanes[kTokens];
        store_wide(lanes, sums[n][c]);
        partials[n * partial_width(size) + d + c] = sum_lanes(load(lanes) + load(lanes + 8));
      }
  }
}

// The segment [start, start + 512) for N consecutive query vectors, from `first`.
template <int N, bool Int8>
void segment(const AttentionJob& job, int first, int start, const float* q, float* scores, float* partials) {
  const int size = job.cache->value_dim(), width = partial_width(size);
  const int last = last_seen(job, first + N - 1), least = first_seen(job, first);  // of all these queries
  q += first * job.cache->head_dim, partials += first * width;
  for (int n = 0; n < N; n++) partials[n * width + size + 1] = 0.0f;
  if (start > last || least >= start + kSegment) return;
  const int end = last + 1 < start + kSegment ? last + 1 - start : kSegment;
  const Seen seen = {least > start ? (least - start) / kTokens : 0, (end + kTokens - 1) / kTokens, end};
  const int32_t* table = job.table + start / kTokens;
  const int done = scores_of<N, keys_at_once(N), Int8>(job, table, seen, seen.first, first == 0, q, scores);
  scores_of<N, 1, Int8>(job, table, seen, done, first == 0, q, scores);
  for (int n = 0; n < N; n++) {
    const int low = first_seen(job, first + n) - start, high = last_seen(job, first + n) + 1 - start;
    const int from = seen.first * kTokens, count = seen.last * kTokens;
    float *tail = partials + n * width + size, *own = scores + n * kSegment;
    if (job.soft_cap > 0.0f) soft_cap(own + from, count - from, job.soft_cap);
    if (high > from && low < count) soften(own, from, count, low, high, tail[0], tail[1]);
    else memset(own + from / kHalves, 0, (count - from) / kHalves * sizeof(float));
  }
  constexpr int columns = Int8 && columns_at_once(N) > 2 ? 2 : columns_at_once(N);  // of one scale
  if constexpr (kHalves == 1)
    if (job.cache->turned > 0) return key_values_of<N, columns, Int8>(job, table, seen, scores, partials);
  const int d = values_of<N, columns, Int8>(job, table, seen, 0, scores, partials);
  values_of<N, 1, Int8>(job, table, seen, d, scores, partials);
}

// The segment for `count` query vectors from `first`, N or less of them.
template <int N, bool Int8>
PG_INLINE void segment_of(int count, const AttentionJob& job, int first, int start, const float* q, float* scores, float* partials) {
  if constexpr (N > 1)
    if (count < N) return segment_of<N - 1, Int8>(count, job, first, start, q, scores, partials);
  segment<N, Int8>(job, first, start, q, scores, partials);
}

template <bool Int8>
PG_INLINE void segment_of_all(const AttentionJob& job, int start, const float* q, float* scores, float* partials) {
  const int queries = job.tokens * job.group, tiles = (queries + kQueriesAtOnce - 1) / kQueriesAtOnce;
  for (int t = 0; t < tiles; t++) {
    const int first = queries * t / tiles, count = queries * (t + 1) / tiles - first;
    segment_of<kQueriesAtOnce, Int8>(count, job, first, start, q, scores, partials);
  }
}

void one_segment(const AttentionJob& job, int start, const float* q, float* scores, float* partials) {
  const bool int8 = kHalves == 1 && job.cache->kind == PG_KV_INT8;  // pairs are of 16 bits
  int8 ? segment_of_all<true>(job, start, q, scores, partials) : segment_of_all<false>(job, start, q, scores, partials);
}

PG_INLINE void scale_queries(const AttentionJob& job, float* q) {
  const int dim = job.cache->head_dim;
  for (int n = 0; n < job.tokens * job.group; n++) {
    for (int d = 0; d < dim; d += 8)
      store(q + n * dim + d, load(job.q + n / job.group * job.q_stride + n % job.group * dim + d) * job.scale);
    if (job.cache->kind != PG_KV_INT8) to_halves(q + n * dim, dim, q + n * dim);
  }
}

PG_INLINE void join_segment(const AttentionJob& job, const float* partials, Running* running, float* acc) {
  const int dim = job.cache->value_dim(), width = partial_width(dim);
  for (int n = 0; n < job.tokens * job.group; n++) {
    const float *part = partials + n * width, top = part[dim], total = part[dim + 1];
    if (total > 0.0f || total != total) join(running[n], acc + n * dim, part, dim, top, total);
  }
}

// What a query's weighted values are multiplied by: a sink takes part in the softmax, and has no value.
PG_INLINE float share(const Running& r, const float* sink) {
  if (!sink) return 1.0f / r.total;
  const float highest = *sink > r.top ? *sink : r.top;
  const float below[8] = {r.top - highest, *sink - highest};
  const F parts = exp(load(below));
  return parts[0] / (r.total * parts[0] + parts[1]);
}

PG_INLINE void write_out(const AttentionJob& job, const Running* running, const float* acc) {
  const int dim = job.cache->value_dim();
  for (int n = 0; n < job.tokens * job.group; n++) {
    float* to = job.out + n / job.group * job.out_stride + n % job.group * dim;
    const float scale = share(running[n], job.sinks ? job.sinks + n % job.group : nullptr);
    for (int d = 0; d < dim; d += 8) store(to + d, load(acc + n * dim + d) * scale);
  }
}

void attention(const AttentionJob& job, float* scratch) {
  const int dim = job.cache->head_dim;
  float *q = scratch, *acc = q + kQueryVectors * dim, *partials = acc + kQueryVectors * dim;
  float* scores = partials + kQueryVectors * partial_width(dim);
  Running running[kQueryVectors] = {};
  scale_queries(job, q);
  for (int start = first_seen(job, 0) / kSegment * kSegment; start <= last_seen(job, job.tokens * job.group - 1); start += kSegment) {
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

// Up to 32 values to 32 codes -127 .. 127 times a scale, which is returned. A NaN or infinity makes the scale NaN.
PG_INLINE uint16_t quantize_kv(const float* x, int n, int8_t* codes) {
  F top = {}, bad = {};
  for (int i = 0; i < n; i += 8) {
    F v = load(x + i);
    top = max(top, abs(v)), bad += v - v;
  }
  uint16_t half[8];
  store_f16(half, splat(max_lanes(top) / 127.0f + sum_lanes(bad)));
  const float scale = load_f16(half)[0], inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
  I whole[4] = {};
  for (int i = 0; i < n; i += 8) whole[i / 8] = to_int(min(max(load(x + i) * inverse, splat(-127.0f)), splat(127.0f)));
  store_i8(codes, whole);
  return half[0];
}

PG_INLINE void store_kv_int8(const KvCache& cache, uint8_t* at, int offset, const float* k, const float* v) {
  const int dim = cache.head_dim;
  uint8_t* values = at + cache.values() + offset * dim;
  uint16_t *key_scales = (uint16_t*)(at + cache.both() * cache.values()), *value_scales = key_scales + cache.scales();
  for (int d = 0, place = offset; d < dim; d += kKvGroup, place += kTokens) {
    const int n = dim - d < kKvGroup ? dim - d : kKvGroup;
    int8_t codes[kKvGroup];
    key_scales[place] = quantize_kv(k + d, n, codes);
    for (int i = 0; i < n; i++) at[(d + i) * kTokens + offset] = (uint8_t)codes[i];
    if (cache.turned > 0) continue;
    value_scales[place] = quantize_kv(v + d, n, codes);
    memcpy(values + d, codes, n);
  }
}

void store_kv(const KvCache& cache, int layer, int64_t block, int head, int offset, const float* k, const float* v) {
  const int dim = cache.head_dim;
  uint8_t* at = cache.at(layer, block, head);
  if (cache.kind == PG_KV_INT8) return store_kv_int8(cache, at, offset, k, v);
  uint16_t halves[kMaxHeadDim], *keys = (uint16_t*)at + kHalves * offset;
  store_halves(k, dim, halves);
  for (int d = 0; d < dim; d += kHalves) memcpy(keys + d * kTokens, halves + d, 2 * kHalves);
  if (cache.turned > 0) return;
  uint16_t* values = (uint16_t*)at + cache.values() + offset / kHalves * kHalves * dim + offset % kHalves;
  store_halves(v, dim, halves);
  for (int d = 0; d < dim; d++) values[kHalves * d] = halves[d];
}

}  // namespace PG_NS
}  // namespace pagoda
