// Sampling of one row. The meaning is that of backend/sampling.py; order: penalties, biases, mask, temperature, top-k,
// top-p, min-p, inverse CDF in token order. Reported log-probabilities are those of the raw logits.
#include "sample.h"

#include <algorithm>
#include <cmath>

namespace pagoda {
namespace {

using Candidate = std::pair<float, int32_t>;

bool better(const Candidate& a, const Candidate& b) { return a.first > b.first || (a.first == b.first && a.second < b.second); }

// The k best (value, id), best first, by a lower bound from the maxima of short blocks: at least k blocks reach it.
void best(const float* x, int64_t n, int64_t k, SampleScratch& s) {
  constexpr int64_t width = 64;
  float bound = -INFINITY;
  const int64_t blocks = (n + width - 1) / width;
  if (k <= blocks) {
    s.block_tops.resize(blocks);
    for (int64_t b = 0; b < blocks; b++) s.block_tops[b] = *std::max_element(x + b * width, x + std::min(n, (b + 1) * width));
    std::nth_element(s.block_tops.begin(), s.block_tops.begin() + (k - 1), s.block_tops.end(), std::greater<float>());
    bound = s.block_tops[k - 1];
  }
  s.candidates.clear();
  for (int64_t i = 0; i < n; i++)
    if (x[i] >= bound && x[i] > -INFINITY) s.candidates.push_back({x[i], (int32_t)i});
  const int64_t kept = std::min<int64_t>(k, s.candidates.size());
  std::partial_sort(s.candidates.begin(), s.candidates.begin() + kept, s.candidates.end(), better);
  s.candidates.resize(kept);
}

void report(const pg_step& st, int l, const float* raw, int64_t vocab, double log_total, SampleScratch& s) {
  if (st.row_top[l] <= 0) return;
  best(raw, vocab, st.row_top[l], s);
  for (size_t i = 0; i < s.candidates.size(); i++) {
    st.out_top_ids[l * st.top_width + i] = s.candidates[i].second;
    st.out_top_logprobs[l * st.top_width + i] = (float)(s.candidates[i].first - log_total);
  }
}

// Penalties over the request's history, then biases, then the mask. Returns whether anything changed.
void adjust(const pg_step& st, int l, float* z, int64_t vocab) {
  const int r = st.row_request[l];
  for (int i = st.history_start[r]; i < st.history_start[r + 1]; i++) {
    float& x = z[st.history_ids[i]];
    const int count = st.history_counts[i];
    x = x > 0 ? x / st.repetition[r] : x * st.repetition[r];
    x -= st.frequency[r] * (float)count;
    if (count > 0) x -= st.presence[r];
  }
  for (int i = st.bias_start[r]; i < st.bias_start[r + 1]; i++) z[st.bias_ids[i]] += st.bias_values[i];
  if (st.row_mask[l] >= 0) {
    const uint32_t* mask = st.masks + (int64_t)st.row_mask[l] * st.mask_width;
    for (int64_t i = 0; i < vocab; i++)
      if (!(mask[i / 32] >> i % 32 & 1)) z[i] = -INFINITY;
  }
}

bool is_adjusted(const pg_step& st, int l) {
  const int r = st.row_request[l];
  return st.history_start[r + 1] > st.history_start[r] || st.bias_start[r + 1] > st.bias_start[r] || st.row_mask[l] >= 0;
}

// Sort the likeliest candidates (weights) until they hold `share` of the total; keep the shortest such prefix.
void nucleus(const float* weights, int64_t n, double total, float share, SampleScratch& s) {
  for (float floor : {1e-3f, 1e-6f, 0.0f}) {
    s.candidates.clear();
    double held = 0;
    for (int64_t i = 0; i < n; i++)
      if (weights[i] > floor) s.candidates.push_back({weights[i], (int32_t)i}), held += weights[i];
    if (held >= share * total) break;
  }
  std::sort(s.candidates.begin(), s.candidates.end(), better);
}

void cut_prefix(double total, float share, std::vector<Candidate>& sorted) {
  double held = 0;
  for (size_t i = 0; i < sorted.size(); i++) {
    held += sorted[i].first;
    if (held >= share * total) return sorted.resize(i + 1);
  }
}

int32_t draw(std::vector<Candidate>& kept, float u) {
  std::sort(kept.begin(), kept.end(), [](auto& a, auto& b) { return a.second < b.second; });
  double total = 0, sum = 0;
  for (auto& c : kept) total += c.first;
  for (auto& c : kept)
    if ((sum += c.first) > u * total) return c.second;
  return kept.back().second;
}

int32_t draw_from_all(const float* weights, int64_t n, double total, float u) {
  double sum = 0;
  int64_t last = -1;
  constexpr int64_t chunk = 64;  // whole chunks are skipped
  for (int64_t start = 0; start < n; start += chunk) {
    const int64_t end = std::min(n, start + chunk);
    float part = 0;
    for (int64_t i = start; i < end; i++) part += weights[i];
    if (sum + part <= u * total) { sum += part; continue; }
    for (int64_t i = start; i < end; i++) {
      if (weights[i] > 0) last = i;
      if ((sum += weights[i]) > u * total) return (int32_t)i;
    }
  }
  for (int64_t i = n - 1; last < 0 && i >= 0; i--)
    if (weights[i] > 0) last = i;
  return (int32_t)last;
}

int32_t choose(const Kernels& k, const pg_step& st, int r, uint32_t position, const float* z, int64_t vocab, float top, SampleScratch& s) {
  if (st.temperature[r] == 0.0f) return (int32_t)(std::find(z, z + vocab, top) - z);
  const float scale = 1.0f / st.temperature[r], u = philox_uniform(st.seed[r], position);
  const bool limited = st.top_k[r] > 0 && st.top_k[r] < vocab;
  s.weights.resize(vocab);
  if (limited) {
    best(z, vocab, st.top_k[r], s);
    double total = 0;
    for (auto& c : s.candidates) k.exp_row(&c.first, 1, top, scale, &c.first), total += c.first;
    if (st.top_p[r] < 1.0f) cut_prefix(total, st.top_p[r], s.candidates);
  } else {
    const double total = k.exp_row(z, vocab, top, scale, s.weights.data());
    if (st.top_p[r] >= 1.0f && st.min_p[r] <= 0.0f) return draw_from_all(s.weights.data(), vocab, total, u);
    if (st.top_p[r] < 1.0f) {
      nucleus(s.weights.data(), vocab, total, st.top_p[r], s);
      cut_prefix(total, st.top_p[r], s.candidates);
    } else {
      s.candidates.clear();
      for (int64_t i = 0; i < vocab; i++)
        if (s.weights[i] >= st.min_p[r]) s.candidates.push_back({s.weights[i], (int32_t)i});
    }
  }
  // the likeliest weight is exp(0) = 1, so min_p is a bound on the weights themselves
  s.candidates.erase(std::remove_if(s.candidates.begin(), s.candidates.end(), [&](auto& c) { return c.first < st.min_p[r]; }), s.candidates.end());
  return draw(s.candidates, u);
}

}  // namespace

float philox_uniform(uint64_t seed, uint32_t position) {
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32), c[4] = {position, 0, 0, 0};
  for (int round = 0; round < 10; round++, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    const uint64_t a = (uint64_t)0xD2511F53u * c[0], b = (uint64_t)0xCD9E8D57u * c[2];
    const uint32_t next[4] = {(uint32_t)(b >> 32) ^ c[1] ^ k0, (uint32_t)b, (uint32_t)(a >> 32) ^ c[3] ^ k1, (uint32_t)a};
    for (int i = 0; i < 4; i++) c[i] = next[i];
  }
  return (float)(c[0] >> 8) * 0x1p-24f;
}

void sample_row(const Kernels& k, const pg_step& st, int l, float* z, int64_t vocab, SampleScratch& s) {
  const int r = st.row_request[l];
  const bool wants = st.row_top[l] >= 0;
  float top = k.row_max(z, vocab);
  int32_t token = st.row_target[l];
  st.out_tokens[l] = token, st.out_logprobs[l] = 0, st.out_ok[l] = std::isfinite(top);
  if (!st.out_ok[l]) return;
  double log_total = 0;
  const float* raw = z;
  if (wants) {
    log_total = top + std::log(k.exp_row(z, vocab, top, 1.0f, nullptr));
    report(st, l, z, vocab, log_total, s);
  }
  if (token < 0) {
    if (is_adjusted(st, l)) {
      if (wants) s.raw.assign(z, z + vocab), raw = s.raw.data();
      adjust(st, l, z, vocab);
      top = k.row_max(z, vocab);
      if (!(st.out_ok[l] = std::isfinite(top))) return;
    }
    const uint32_t position = st.positions[r] + (st.rows[l] - st.starts[r]) + 1;
    token = choose(k, st, r, position, z, vocab, top, s);
  }
  st.out_tokens[l] = token;
  if (wants) st.out_logprobs[l] = (float)(raw[token] - log_total);
}

}  // namespace pagoda
