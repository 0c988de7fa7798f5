// Running a step: every thread walks the program; each operation is cut into chunks that threads take from a counter,
// and ends with a barrier.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "context.h"

using namespace pagoda;

namespace {

constexpr int64_t kRowBytes = 192 << 10;  // activations that stay in the second-level cache while weights pass

class Runner {
 public:
  Runner(pg_context& c, const pg_step& st) : c_(c), st_(st), count(std::min(st.rows_count, c.dims.max_rows)) {
    reset(0);
  }

  void operator()(int thread) {
    rope_tables(thread);
    c_.team.barrier();
    for (size_t start = 0; start < c_.ops.size(); start = next_rows(thread))
      for (size_t i = start; i < c_.ops.size(); i++) {
        run(c_.ops[i], c_.counters[i], thread);
        c_.team.barrier();
      }
  }

 private:
  void reset(size_t from) {
    for (size_t i = from; i < c_.ops.size(); i++) c_.counters[i].next.store(0, std::memory_order_relaxed);
    rows_done.next.store(0, std::memory_order_relaxed);
  }

  // More rows of logits than the head takes at a time: where to go on in the program, or its end.
  size_t next_rows(int thread) {
    if (first + count >= st_.rows_count) return c_.ops.size();
    size_t gather = 0;
    while (c_.ops[gather].kind != PG_GATHER) gather++;
    c_.team.barrier();
    if (thread == 0) {
      first += count, count = std::min<int64_t>(st_.rows_count - first, c_.dims.max_rows);
      reset(gather);
    }
    c_.team.barrier();
    return gather;
  }

  void run(const pg_op& op, Counter& next, int thread) {
    switch (op.kind) {
      case PG_EMBED: return embed(op, next);
      case PG_NORM: return norm(op, next);
      case PG_GATHER: return gather(op, next);
      case PG_MATMUL: return matmul(op, next, c_.buffers[op.out]);
      case PG_ROPE: return rope(op, next);
      case PG_ATTENTION: return attention(op, next, thread);
      case PG_SILU: return silu(op, next);
      case PG_HEAD: return head(op, next, thread);
    }
  }

  int64_t rows(const pg_op& op) const { return op.flags & PG_LOGIT_ROWS ? count : st_.tokens_count; }

  // Body(i) for i in [0, n), `step` at a time, shared out among the threads.
  template <typename Body> void share(Counter& next, int64_t n, int64_t step, Body body) {
    for (int64_t from; (from = next.next.fetch_add(step, std::memory_order_relaxed)) < n;)
      for (int64_t i = from; i < std::min(n, from + step); i++) body(i);
  }
  // A few chunks for each thread.
  int64_t chunk(int64_t n, int64_t per_thread = 4) const { return std::max<int64_t>(1, n / (c_.team.size() * per_thread)); }

  void finish_row(const pg_op& op, int64_t row) {
    if (!(op.flags & PG_QUANTIZE)) return;
    Buffer& b = c_.buffers[op.out];
    const int64_t blocks = b.width / kBlock;
    c_.kernels->quantize(b.row(row), b.width, reinterpret_cast<int8_t*>(b.q.data()) + row * b.width,
                         reinterpret_cast<float*>(b.d.data()) + row * blocks, reinterpret_cast<float*>(b.s.data()) + row * blocks,
                         reinterpret_cast<float*>(b.h.data()) + row * blocks * 2);
  }

  void rope_tables(int thread) {
    const int half = c_.dims.rope_dim / 2, size = c_.team.size();
    float* table = reinterpret_cast<float*>(c_.rope_pages.data());
    for (int r = 0; r < st_.requests; r++)
      for (int t = st_.starts[r]; t < st_.starts[r + 1]; t++) {
        if (t % size != thread) continue;
        const double position = st_.positions[r] + (t - st_.starts[r]);
        for (int i = 0; i < half; i++) {
          const double angle = position * c_.inv_freq[i];
          table[(int64_t)t * 2 * half + i] = (float)(std::cos(angle) * c_.dims.rope_factor);
          table[(int64_t)t * 2 * half + half + i] = (float)(std::sin(angle) * c_.dims.rope_factor);
        }
      }
  }

  void embed(const pg_op& op, Counter& next) {
    const Weight& w = c_.weights[op.weight];
    Buffer& out = c_.buffers[op.out];
    share(next, rows(op), 1, [&](int64_t t) { c_.kernels->dequantize_row(w.parts[0], w.k, st_.tokens[t], out.row(t)); });
  }

  void norm(const pg_op& op, Counter& next) {
    Buffer &in = c_.buffers[op.in], &out = c_.buffers[op.out];
    share(next, rows(op), chunk(rows(op)), [&](int64_t t) {
      c_.kernels->norm(in.row(t), c_.vectors[op.vector].data(), in.width, op.f, out.row(t));
      finish_row(op, t);
    });
  }

  void gather(const pg_op& op, Counter& next) {
    Buffer &in = c_.buffers[op.in], &out = c_.buffers[op.out];
    share(next, count, 4, [&](int64_t l) {
      memcpy(out.row(l), in.row(st_.rows[first + l]), in.width * sizeof(float));
      finish_row(op, l);
    });
  }

  void silu(const pg_op& op, Counter& next) {
    Buffer &in = c_.buffers[op.in], &out = c_.buffers[op.out];
    share(next, rows(op), chunk(rows(op)), [&](int64_t t) {
      c_.kernels->silu(in.row(t), in.row(t) + out.width, out.width, out.row(t));
      finish_row(op, t);
    });
  }

  void matmul(const pg_op& op, Counter& next, const Buffer& out) {
    multiply(op, next, rows(op), out.row(0), out.width);
  }

  // Work units are (block of rows, chunk of panels); a chunk never crosses two parts.
  void multiply(const pg_op& op, Counter& next, int64_t n, float* to, int64_t stride) {
    const Weight& w = c_.weights[op.weight];
    const Buffer& in = c_.buffers[op.in];
    const Rows a = {in.row(0), reinterpret_cast<int8_t*>(in.q.data()), reinterpret_cast<float*>(in.d.data()),
                    reinterpret_cast<float*>(in.s.data()), reinterpret_cast<float*>(in.h.data()), w.k};
    const Out out = {to, stride, op.vector >= 0 ? c_.vectors[op.vector].data() : nullptr, (op.flags & PG_ADD) != 0};
    const int64_t row_step = std::max<int64_t>(16, kRowBytes / w.k), row_blocks = (n + row_step - 1) / row_step;
    const int64_t step = chunk(w.panels, row_blocks > 2 ? 4 : 8), chunks = (w.panels + step - 1) / step;
    share(next, row_blocks * chunks, 1, [&](int64_t unit) {
      const int64_t block = unit / chunks, from = unit % chunks * step, to_panel = std::min(w.panels, from + step);
      const int64_t r0 = n * block / row_blocks, r1 = n * (block + 1) / row_blocks;
      for (const Part& p : w.parts) {
        const int64_t panels = (p.rows + kPanel - 1) / kPanel;
        const int64_t p0 = std::max<int64_t>(0, from - p.first_panel), p1 = std::min(panels, to_panel - p.first_panel);
        if (p0 < p1) c_.kernels->matmul(p, p0, p1, a, r0, r1, out);
      }
    });
  }

  int request_of(int64_t token) const {
    return (int)(std::upper_bound(st_.starts, st_.starts + st_.requests + 1, (int32_t)token) - st_.starts) - 1;
  }
  const int32_t* table_of(int r) const { return st_.block_tables + (int64_t)st_.slots[r] * st_.table_width; }

  void rope(const pg_op& op, Counter& next) {
    Buffer& b = c_.buffers[op.in];
    const pg_dims& d = c_.dims;
    const float* q_norm = op.vector >= 0 ? c_.vectors[op.vector].data() : nullptr;
    const float* k_norm = op.vector2 >= 0 ? c_.vectors[op.vector2].data() : nullptr;
    share(next, st_.tokens_count, chunk(st_.tokens_count), [&](int64_t t) {
      const int r = request_of(t), position = st_.positions[r] + (int)(t - st_.starts[r]);
      const float* cos = reinterpret_cast<float*>(c_.rope_pages.data()) + t * d.rope_dim;
      for (int h = 0; h < d.heads + d.kv_heads; h++) {
        float* x = b.row(t) + h * d.head_dim;
        const float* weight = h < d.heads ? q_norm : k_norm;
        if (weight) c_.kernels->norm(x, weight, d.head_dim, op.f, x);
        c_.kernels->rotate(x, cos, cos + d.rope_dim / 2, d.rope_dim, d.rope_interleaved != 0);
      }
      const int64_t block = table_of(r)[position / kTokens];
      const float* k = b.row(t) + d.heads * d.head_dim;
      for (int h = 0; h < d.kv_heads; h++)
        c_.kernels->store_kv(c_.kv, op.layer, block, h, position % kTokens, k + h * d.head_dim, k + (d.kv_heads + h) * d.head_dim);
    });
  }

  // Jobs: a few consecutive tokens of a request, for one KV head.
  void attention(const pg_op& op, Counter& next, int thread) {
    const pg_dims& d = c_.dims;
    Buffer &in = c_.buffers[op.in], &out = c_.buffers[op.out];
    const int group = d.heads / d.kv_heads, width = std::max(1, kQueryVectors / group);
    int64_t job = next.next.fetch_add(1, std::memory_order_relaxed), before = 0;
    for (int r = 0; r < st_.requests; r++) {
      const int tokens = st_.starts[r + 1] - st_.starts[r], tiles = (tokens + width - 1) / width;
      const int64_t after = before + (int64_t)tiles * d.kv_heads;
      for (; job < after; job = next.next.fetch_add(1, std::memory_order_relaxed)) {
        // the longest rows of a prompt first, so that the threads end together
        const int tile = tiles - 1 - (int)((job - before) / d.kv_heads), head = (int)((job - before) % d.kv_heads);
        const int from = tile * width, n = std::min(width, tokens - from);
        const int64_t row = st_.starts[r] + from;
        c_.kernels->attention({&c_.kv, table_of(r), op.layer, head, group, n, st_.positions[r] + from,
                               in.row(row) + head * group * d.head_dim, in.width, out.row(row) + head * group * d.head_dim, out.width, op.f},
                              c_.attention_scratch[thread].data());
      }
      before = after;
    }
    if (!(op.flags & PG_QUANTIZE)) return;
    c_.team.barrier();
    for (int64_t t = thread; t < st_.tokens_count; t += c_.team.size()) finish_row(op, t);
  }

  void head(const pg_op& op, Counter& next, int thread) {
    float* logits = reinterpret_cast<float*>(c_.logit_pages.data());
    multiply(op, next, count, logits, c_.dims.vocab);
    c_.team.barrier();
    for (int64_t l; (l = rows_done.next.fetch_add(1, std::memory_order_relaxed)) < count;) {
      float* row = logits + l * c_.dims.vocab;
      if (st_.out_logits) memcpy(st_.out_logits + (first + l) * c_.dims.vocab, row, c_.dims.vocab * sizeof(float));
      sample_row(*c_.kernels, st_, (int)(first + l), row, c_.dims.vocab, c_.scratch[thread]);
    }
  }

  pg_context& c_;
  const pg_step& st_;
  int64_t first = 0, count;  // rows of logits that go through the head now
  Counter rows_done;
};

bool valid(const pg_context& c, const pg_step& st) {
  if (st.tokens_count < 1 || st.tokens_count > c.dims.max_tokens || st.starts[st.requests] != st.tokens_count) return false;
  for (int t = 0; t < st.tokens_count; t++)
    if (st.tokens[t] < 0 || st.tokens[t] >= c.dims.vocab) return false;
  for (int l = 0; l < st.rows_count; l++)
    if (st.rows[l] < 0 || st.rows[l] >= st.tokens_count) return false;
  for (int r = 0; r < st.requests; r++) {
    const int last = (st.positions[r] + st.starts[r + 1] - st.starts[r] - 1) / kTokens;
    if (last >= st.table_width) return false;
    for (int b = 0; b <= last; b++) {
      const int block = st.block_tables[(int64_t)st.slots[r] * st.table_width + b];
      if (block < 0 || block >= c.dims.num_blocks) return false;
    }
  }
  return true;
}

}  // namespace

extern "C" int32_t pg_run(pg_context* c, const pg_step* st) {
  if (!valid(*c, *st)) {
    c->error = "a step plan that does not fit the model";
    return -1;
  }
  Runner runner(*c, *st);
  c->team.run(std::ref(runner));
  return 0;
}
