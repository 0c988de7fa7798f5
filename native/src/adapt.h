// LoRA adapters: what they add to the products of the rows whose requests use them. All sums go along K, so that a row's
// result does not depend on the rows beside it.
#pragma once
#include <algorithm>
#include <vector>

#include "chain.h"

namespace pagoda {

// Repack an adapter; false where it does not fit the model.
inline bool make_adapter(const pg_context& c, const pg_low_rank* pairs, int32_t n, Adapter& out) {
  int64_t bytes = 0;
  const auto size = [](int64_t rows, int64_t k) { return panels_of(rows) * panel_bytes(PG_F32, k); };
  for (int32_t i = 0; i < n; i++) {
    const pg_low_rank& p = pairs[i];
    if (p.weight < 0 || p.weight >= (int32_t)c.weights.size() || p.rank <= 0 || p.column < 0 || p.outputs <= 0) return false;
    if (p.column + p.outputs > c.weights[p.weight].rows) return false;
    bytes += size(p.rank, c.weights[p.weight].k) + size(p.outputs, p.rank);
  }
  out.pages = Pages(bytes);
  out.of_weight.resize(c.weights.size());
  uint8_t* at = out.pages.data();
  const auto take = [&](const float* data, int64_t rows, int64_t k, int64_t first_row) {
    const Part part = {PG_F32, rows, first_row, 0, panel_bytes(PG_F32, k), at};
    repack({reinterpret_cast<const uint8_t*>(data), rows, k, PG_F32, 0}, at, 0, panels_of(rows));
    at += size(rows, k);
    return part;
  };
  for (int32_t i = 0; i < n; i++) {
    const pg_low_rank& p = pairs[i];
    std::vector<LowRank>& own = out.of_weight[p.weight];
    const Part down = take(p.down, p.rank, c.weights[p.weight].k, 0), up = take(p.up, p.outputs, p.rank, p.column);
    own.push_back({down, up, p.rank, own.empty() ? 0 : own.back().before + own.back().rank});
    out.ranks = std::max(out.ranks, own.back().before + p.rank);
  }
  return true;
}

inline bool has_adapters(const pg_context& c, const pg_step& st) {
  for (int r = 0; r < st.requests && st.adapters; r++)
    if (st.adapters[r] >= (int)c.adapters.size() || (st.adapters[r] >= 0 && c.adapters[st.adapters[r]].of_weight.empty())) return false;
  return true;
}

// Of a task of PG_ADAPT: a run of its rows, one of the pairs of their adapter, and where its small vectors are.
struct Adapting {
  Adapting(pg_context& c, Chain& chain, const Task& task, int64_t number, size_t pair) : run(chain.adapted[task.first + number]) {
    const std::vector<LowRank>& pairs = c.adapters[run.place].of_weight[task.op->weight];
    if (pair >= pairs.size()) return;
    low = &pairs[pair];
    small = chain.small.data() + (run.row - task.row) * chain.small_width + low->before * run.rows;
  }
  const Adapted& run;
  const LowRank* low = nullptr;  // null where it has no such pair
  float* small = nullptr;        // [rows of the run][rank]
};

// Chunks are runs of rows times the pairs that a product may have (op.layer).
inline void adapt_down(pg_context& c, Chain& chain, const Task& task, int64_t chunk) {
  const Adapting a(c, chain, task, chunk / task.op->layer, chunk % task.op->layer);
  if (!a.low) return;
  Rows in{};
  in.f = c.buffers[task.op->in].row(a.run.row), in.k = c.weights[task.op->weight].k;
  c.kernels->matmul(a.low->down, 0, ceil_div(a.low->rank, kPanel), in, 0, a.run.rows, {a.small, a.low->rank, nullptr, false});
}

// Chunks are runs of rows times slices of the outputs (task.step).
inline void adapt_up(pg_context& c, Chain& chain, const Task& task, int64_t chunk) {
  const Buffer& out = c.buffers[task.op->out];
  const int64_t slice = chunk % task.step;
  for (size_t pair = 0; pair < (size_t)task.op->layer; pair++) {
    const Adapting a(c, chain, task, chunk / task.step, pair);
    if (!a.low) return;
    const int64_t panels = ceil_div(a.low->up.rows, kPanel);
    Rows in{};
    in.f = a.small, in.k = a.low->rank;
    const Out to = {out.row(a.run.row), out.width, nullptr, true};
    c.kernels->matmul(a.low->up, panels * slice / task.step, panels * (slice + 1) / task.step, in, 0, a.run.rows, to);
  }
}

}  // namespace pagoda
