// Mixtures of experts: which rows of a step go to which expert, and the two grouped products. Rows are sorted by expert,
// so that each matrix is read once for all its rows; a row's sum goes over its experts in the order of their numbers.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>

#include "context.h"
#include "rows.h"

namespace pagoda {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Group {  // the rows that chose an expert
  int32_t expert;
  int64_t first, rows;   // in the order of experts
  int64_t cost, before;  // of one block of outputs; of those of all groups before
};

// The choices of the rows of a chain, in one layer after the other.
class Routing {
 public:
  Routing(const pg_dims& d, int64_t first_row, int64_t rows)
      : first_row_(first_row), router_(d.router), experts_(d.router.experts), active_(d.router.active),
        picks_(rows * active_), order_(rows * active_), next_(experts_) {}
  // The experts that a row likes best, ties by lower number; the logits become their exponents, or sigmoids.
  // `bias`, `weights`: see PG_ROUTE; `scratch` has room for two rows of experts.
  void choose(const Kernels& k, int64_t row, float* logits, const float* bias, const float* weights, float* scratch) {
    double total = 1.0;
    if (router_.sigmoid) sigmoids(k, logits);
    else total = k.exp_row(logits, experts_, k.row_max(logits, experts_), 1.0f, logits);
    const float* liked = logits;
    if (bias) {
      for (int e = 0; e < experts_; e++) scratch[e] = logits[e] / (float)total + bias[e];
      liked = scratch;
    }
    Pick* picks = &picks_[row * active_];
    if (router_.groups > 1) pick_of_best_groups(liked, picks, scratch + experts_);
    else pick(liked, 0, experts_, picks, 0);
    for (int i = 0; i < active_; i++) picks[i].share = logits[picks[i].expert];
    if (router_.normalized) {
      total = 0.0;
      for (int i = 0; i < active_; i++) total += picks[i].share;
      total = std::max(total, 1e-20);
    }
    for (int i = 0; i < active_; i++) picks[i].share = (float)(picks[i].share / total) * router_.scale;
    for (int i = 0; weights && i < active_; i++) picks[i].share *= weights[picks[i].expert];
  }
  // Sort what all rows chose by expert.
  void group() {
    std::fill(next_.begin(), next_.end(), 0);
    for (const Pick& p : picks_) next_[p.expert]++;
    groups_.clear(), cost_ = 0;
    int64_t place = 0;
    for (int e = 0; e < experts_; e++) {
      const int64_t rows = next_[e], cost = std::max<int64_t>(rows, 4);  // to read a matrix takes as long as 4 rows
      if (rows == 0) continue;
      groups_.push_back({e, place, rows, cost, cost_});
      next_[e] = place, place += rows, cost_ += cost;
    }
    for (size_t i = 0; i < picks_.size(); i++)
      order_[next_[picks_[i].expert]++] = {(int32_t)(first_row_ + (int64_t)i / active_), picks_[i].share};
  }
  const std::vector<Group>& groups() const { return groups_; }
  int64_t cost() const { return cost_; }
  int64_t row(int64_t place) const { return order_[place].row; }
  float share(int64_t place) const { return order_[place].share; }
  int64_t first_place() const { return first_row_ * active_; }  // of the chain, in buffers that have a row for each choice

 private:
  struct Pick {
    int32_t expert;
    float share;
  };
  struct Chosen {
    int32_t row;
    float share;
  };
  void sigmoids(const Kernels& k, float* logits) const {
    k.exp_row(logits, experts_, 0.0f, -1.0f, logits);
    for (int e = 0; e < experts_; e++) logits[e] = 1.0f / (1.0f + logits[e]);
  }
  // Take the experts [from, to) into the `n` picks so far, the best first; returns how many there are.
  int pick(const float* liked, int from, int to, Pick* picks, int n) const {
    for (int e = from; e < to; e++) {
      const float share = liked[e];
      if (n == active_ && !(share > picks[n - 1].share)) continue;
      int at = n < active_ ? n++ : n - 1;
      for (; at > 0 && share > picks[at - 1].share; at--) picks[at] = picks[at - 1];
      picks[at] = {e, share};
    }
    return n;
  }
  void pick_of_best_groups(const float* liked, Pick* picks, float* merits) const {
    const int each = experts_ / router_.groups;
    for (int g = 0; g < router_.groups; g++) merits[g] = merit(liked + g * each, each);
    for (int g = 0, n = 0; g < router_.groups; g++) {
      int better = 0;
      for (int i = 0; i < router_.groups; i++) better += merits[i] > merits[g] || (merits[i] == merits[g] && i < g);
      if (better < router_.active_groups) n = pick(liked, g * each, (g + 1) * each, picks, n);
    }
  }
  float merit(const float* all, int each) const {
    float best = -INFINITY, second = -INFINITY;
    for (int i = 0; i < each; i++) {
      if (all[i] > best) second = best, best = all[i];
      else if (all[i] > second) second = all[i];
    }
    return router_.group_best > 1 ? second + best : best;
  }

  int64_t first_row_, cost_ = 0;
  pg_router router_;
  int32_t experts_, active_;
  std::vector<Pick> picks_;
  std::vector<Chosen> order_;
  std::vector<int64_t> next_;
  std::vector<Group> groups_;
};

// out *= sigmoid(x * w): how much of the shared expert a row takes.
inline void gate(const float* x, const float* w, int64_t n, float* out, int64_t size) {
  float sums[8] = {};
  for (int64_t i = 0; i < n; i++) sums[i % 8] += x[i] * w[i];
  float sum = 0.0f;
  for (float each : sums) sum += each;
  const float share = 1.0f / (1.0f + std::exp(-sum));
  for (int64_t i = 0; i < size; i++) out[i] *= share;
}

constexpr int64_t kGatherBytes = 192 << 10;  // of codes, that stay in the second-level cache while weights pass
constexpr int64_t kFewRows = 8;              // that go over all outputs of a chunk at once
constexpr int64_t kOutputs = 64;             // that more rows go over at a time
constexpr int64_t kDownRows = 64, kDownOutputs = 256;

constexpr int64_t gathered_rows(int64_t k) { return std::max<int64_t>(16, kGatherBytes / k); }

// Floats that a chunk of either product needs: copies of rows, as floats and as codes, and its results.
inline int64_t experts_scratch(const Weight& w) {
  const int64_t rows = gathered_rows(w.k), results = 2 * std::max(kFewRows * (w.parts[0].rows + kBlock), rows * kOutputs);
  return 2 * rows * w.k + std::max(results, kDownRows * kDownOutputs);
}

inline Rows rows_of(const Buffer& b, int64_t k) {
  const Codes c = b.codes(0);
  return {b.row(0), c.q, c.d, c.s, c.n, c.h, c.wide, c.bf16, k};
}

struct Forms {  // of activations, that are read
  bool floats, codes, bf16;
};

// Rows [place, place + n) in the order of experts, copied to `to`: what products with these types read of them.
inline Rows gather(const Buffer& from, const Routing& routing, int64_t place, int64_t n, int64_t k, const Forms& forms, float* to) {
  const int64_t most = gathered_rows(k), blocks = k / kBlock;
  float* f = to;
  int8_t* q = (int8_t*)(f + most * k);
  float *d = (float*)(q + most * k), *s = d + most * blocks;
  int32_t *sums = (int32_t*)(s + most * blocks), *h = sums + most * blocks;
  int16_t* wide = (int16_t*)(h + 2 * most * blocks);
  uint16_t* bf16 = (uint16_t*)wide;  // there are never both
  bool has_wide = false;
  for (int64_t i = 0; i < n; i++) {
    const int64_t row = routing.row(place + i);
    if (forms.floats) memcpy(f + i * k, from.row(row), k * 4);
    const Codes c = from.codes(row);
    if (forms.bf16) memcpy(bf16 + i * k, c.bf16, k * 2);
    if (!forms.codes) continue;
    memcpy(q + i * k, c.q, k), memcpy(d + i * blocks, c.d, blocks * 4), memcpy(s + i * blocks, c.s, blocks * 4);
    memcpy(sums + i * blocks, c.n, blocks * 4), memcpy(h + 2 * i * blocks, c.h, blocks * 8);
    if ((has_wide = c.wide != nullptr)) memcpy(wide + i * k, c.wide, k * 2);
  }
  return {f, q, d, s, sums, h, has_wide ? wide : nullptr, forms.bf16 ? bf16 : nullptr, k};
}

// Where the results of rows from `row` on and outputs from `output` on go.
inline Out results(float* to, int64_t stride, const Part& part, int64_t row, int64_t output, const float* bias) {
  return {to - row * stride - part.first_row - output, stride, bias, false};
}

inline const float* bias_of(const pg_context& c, const pg_op& op) { return op.vector >= 0 ? c.vectors[op.vector].data() : nullptr; }

inline int64_t up_chunks(int64_t rows, int threads) { return threads * (rows > 8 ? 16 : 8); }

// Outputs [from, to) of gate and up (or of up alone) of one expert, for all its rows.
inline void expert_up(pg_context& c, const Routing& routing, const pg_op& op, const Group& group, int64_t from, int64_t to, float* scratch) {
  const Weight& w = c.weights[op.weight];
  const Buffer &in = c.buffers[op.in], &out = c.buffers[op.out];
  const int count = op.flags & PG_SQUARED ? 1 : 2;
  const Part* parts = &w.parts[count * group.expert];
  const Form gate = form_of(*c.kernels, parts[0].type, w.k), up = form_of(*c.kernels, parts[count - 1].type, w.k);
  const auto reads = [=](Form form) { return gate == form || up == form; };
  const Forms forms = {reads(Form::floats), reads(Form::codes), reads(Form::bf16)};
  const int64_t most = gathered_rows(w.k), size = parts[0].rows;
  const float* bias = bias_of(c, op);
  const auto gated = op.flags & PG_CLAMPED ? c.kernels->clamped : op.flags & PG_GELU_UP ? c.kernels->gelu_gated : c.kernels->silu;
  float* at = scratch + 2 * most * w.k;
  for (int64_t done = 0; done < group.rows; done += most) {
    const int64_t n = std::min(most, group.rows - done), place = group.first + done;
    const Rows a = n == 1 ? rows_of(in, w.k) : gather(in, routing, place, n, w.k, forms, scratch);
    const int64_t row = n == 1 ? routing.row(place) : 0, step = n <= kFewRows ? to - from : kOutputs;
    for (int64_t first = from; first < to; first += step) {
      const int64_t last = std::min(to, first + step), stride = ceil_div(last - first, kPanel) * kPanel;
      float* halves[2] = {at, at + n * stride};
      for (int i = 0; i < count; i++)
        c.kernels->matmul(parts[i], first / kPanel, ceil_div(last, kPanel), a, row, row + n, results(halves[i], stride, parts[i], row, first, bias));
      for (int64_t i = 0; i < n; i++) {
        const int64_t value = (routing.first_place() + place + i) * size + first;
        float* to_row = out.row(0) + value;
        if (count == 1) relu2(halves[0] + i * stride, last - first, to_row);
        else gated(halves[0] + i * stride, halves[1] + i * stride, last - first, to_row);
        if (op.flags & PG_QUANTIZE) make_forms(*c.kernels, to_row, last - first, out.codes_at(value));
      }
    }
  }
}

// Part `chunk` of `chunks` of gate and up of all experts, cut between blocks of outputs so that all parts cost the same.
inline void experts_up(pg_context& c, const Routing& routing, const pg_op& op, int64_t chunk, int64_t chunks, float* scratch) {
  const std::vector<Group>& groups = routing.groups();
  const int64_t size = c.weights[op.weight].parts[0].rows, blocks = ceil_div(size, kBlock), total = routing.cost() * blocks;
  const int64_t begin = total * chunk / chunks, end = total * (chunk + 1) / chunks;
  const auto after = [&](int64_t cost, const Group& g) { return cost < g.before * blocks; };
  for (auto g = std::upper_bound(groups.begin(), groups.end(), begin, after) - 1; g != groups.end() && g->before * blocks < end; ++g) {
    const auto block = [&](int64_t cost) { return std::clamp<int64_t>((cost - g->before * blocks) / g->cost, 0, blocks); };
    const int64_t from = begin <= g->before * blocks ? 0 : block(begin), to = block(end);
    if (from < to) expert_up(c, routing, op, *g, from * kBlock, std::min(size, to * kBlock), scratch);
  }
}

inline int64_t down_step(const Part& each, int threads) {  // panels of a chunk
  const int64_t fair = panels_of(each.rows) / (threads * 8) / 2 * 2;
  return std::clamp<int64_t>(fair, 2, kDownOutputs / kPanel);
}

// Panels [first, first + step) of down of all experts, added to the rows that chose them.
inline void experts_down(pg_context& c, const Routing& routing, const pg_op& op, int64_t first, int64_t step, float* scratch) {
  const Weight& w = c.weights[op.weight];
  const Buffer& out = c.buffers[op.out];
  const Rows a = rows_of(c.buffers[op.in], w.k);
  const int64_t size = w.parts[0].rows, last = std::min(first + step, ceil_div(size, kPanel));
  const int64_t stride = (last - first) * kPanel, outputs = std::min(size, last * kPanel) - first * kPanel;
  for (const Group& g : routing.groups())
    for (int64_t done = 0; done < g.rows; done += kDownRows) {
      const int64_t n = std::min(kDownRows, g.rows - done), place = g.first + done, row = routing.first_place() + place;
      const Part& part = w.parts[g.expert];
      c.kernels->matmul(part, first, last, a, row, row + n, results(scratch, stride, part, row, first * kPanel, bias_of(c, op)));
      for (int64_t i = 0; i < n; i++) {
        const float share = routing.share(place + i), *from = scratch + i * stride;
        float* to = out.row(routing.row(place + i)) + first * kPanel;
        for (int64_t j = 0; j < outputs; j++) to[j] += share * from[j];
      }
    }
}

}  // namespace pagoda
