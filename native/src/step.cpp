// Running a step: chains of phases, each cut into chunks that threads take; a thread that comes late passes over what is
// done.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <deque>
#include <optional>

#include "adapt.h"
#include "latent_step.h"
#include "rope_step.h"
#include "rows.h"
#include "valid.h"

using namespace pagoda;

namespace {

using Clock = std::chrono::steady_clock;

class StepJob : public Job {
 public:
  StepJob(pg_context& c, const pg_step& st) : c_(c), st_(st) {
    int count = most_chains();
    if (count > 1) count = find_order(count);
    for (int i = 0; i < count; i++) {
      const Range threads = share(c.team.size(), i, count), tokens = token_range(i, count);
      const auto logit = [&](int64_t token) { return std::lower_bound(st.rows, st.rows + st.rows_count, token) - st.rows; };
      const Range logits = count == 1 ? Range{0, st.rows_count} : Range{logit(tokens.begin), logit(tokens.end)};
      chains_.emplace_back(c, st_, (int)threads.size(), tokens, logits, share(c.dims.max_rows, i, count));
    }
  }

  // First the chain of its own, then what others have left.
  void work(int thread) override {
    const int count = (int)chains_.size(), own = (int)((thread * count + count - 1) / c_.team.size());
    std::vector<size_t> done(count);
    for (int i = 0; i < count; i++) {
      const int chain = (own + i) % count;
      follow(chain, chains_[chain].items.size(), thread, done);
    }
  }

  // The step pauses behind a phase of its only chain, when another as long as the longest would end later than this.
  // A thread that comes late may find it going on again, and goes on with the others.
  void go_on_until(Clock::time_point pause) {
    pause_ = pause, last_ = Clock::now(), longest_ = {};
    end_ = SIZE_MAX;
  }
  bool done() const { return chains_[0].items.back().phase.done(); }

 private:
  static Range share(int64_t total, int i, int count) { return {total * i / count, total * (i + 1) / count}; }
  // A chain has as many of the tokens as it has of the threads.
  Range token_range(int i, int count) const {
    const Range threads = share(c_.team.size(), i, count);
    return {st_.tokens_count * threads.begin / c_.team.size(), st_.tokens_count * threads.end / c_.team.size()};
  }

  // Threads that each take rows of their own through the whole step need not wait for each other, but each chain reads
  // all weights: there must be rows enough to make that cheap. Of the experts each has but a few rows;
  // in a delta net a token waits for the one before it; and in a picture it may see one that comes later.
  int most_chains() const {
    int count = 1;
    while (c_.heads.kv.data && !st_.last_seen && !c_.dims.router.experts && !c_.dims.delta.layers && 2 * count <= c_.team.size() && c_.kernels->chain_rows * 4 * count * count <= st_.tokens_count) count *= 2;
    return std::is_sorted(st_.rows, st_.rows + st_.rows_count) ? count : 1;
  }

  // Where a request goes on in the next chain, or reads cache blocks that another writes in this step, the later chain
  // has to wait in each layer for the keys of those before it. Were it the other way round there can be one chain only.
  int find_order(int count) {
    const auto chain_of = [&](int64_t token) {
      int i = 0;
      while (token >= token_range(i, count).end) i++;
      return i;
    };
    const auto blocks = [&](int r, auto visit) {
      const int first = st_.positions[r] / kTokens, last = (st_.positions[r] + st_.starts[r + 1] - st_.starts[r] - 1) / kTokens;
      for (int b = 0; b <= last; b++) visit(c_.writers[table_of(r)[b]], b >= first);
    };
    bool tangled = false;
    for (int r = 0; r < st_.requests; r++) {
      const int last = chain_of(st_.starts[r + 1] - 1);
      in_order_ |= chain_of(st_.starts[r]) != last;
      blocks(r, [&](int32_t& writer, bool written) { if (written) writer = std::max(writer, last); });
    }
    for (int r = 0; r < st_.requests; r++) {
      const int first = chain_of(st_.starts[r]), last = chain_of(st_.starts[r + 1] - 1);
      blocks(r, [&](int32_t& writer, bool) {
        in_order_ |= writer >= 0 && writer != first;
        tangled |= writer > last;
      });
    }
    for (int r = 0; r < st_.requests; r++) blocks(r, [](int32_t& writer, bool) { writer = -1; });
    return tangled ? 1 : count;
  }

  // The items of a chain up to `end`; `done` says how far this thread knows each chain to be done.
  void follow(int chain, size_t end, int thread, std::vector<size_t>& done) {
    Chain& each = chains_[chain];
    for (size_t& i = done[chain]; i < std::min(end, end_.load()); i++) {
      const Item& item = each.items[i];
      if (item.phase.done()) continue;
      for (int before = 0; in_order_ && item.attention >= 0 && before < chain; before++)
        follow(before, chains_[before].cached[item.attention], thread, done);
      item.phase.share(thread, [&](int64_t chunk) { run(each, item.task, chunk, thread); }, [&] {
        run_tail(each, item, thread);
        if (pause_ && pauses()) end_ = i + 1;
      });
    }
  }

  bool pauses() {
    const Clock::time_point now = Clock::now();
    longest_ = std::max(longest_, now - last_), last_ = now;
    return now + longest_ > *pause_;
  }

  void run(Chain& chain, const Task& task, int64_t chunk, int thread) {
    switch (task.kind) {
      case kStart: return;
      case PG_MATMUL: return multiply(chain, task, chunk, c_.buffers[task.op->out].row(task.row), c_.buffers[task.op->out].width);
      case PG_HEAD: return multiply(chain, task, chunk, logits(task.row), c_.dims.vocab);
      case PG_ATTENTION: return attention(chain, *task.op, chunk, thread);
      case PG_DELTA: case PG_CONVOLVE: case PG_SCAN: return run_with_state(c_, st_, *task.op, chunk, c_.row_scratch[thread].data());
      case PG_ADAPT: return adapt_down(c_, chain, task, chunk);
      case kAdaptUp: return adapt_up(c_, chain, task, chunk);
      case PG_ABSORB:
      case PG_EXPAND: return head_products(c_, *task.op, task.row, task.rows, chunk, c_.row_scratch[thread].data());
      case kJoin: return join(chain, *task.op, chunk, thread);
      case PG_ATTEND_ALL: return attend_all(chain, task, chunk, thread);
      case PG_EXPERTS_UP:
        return experts_up(c_, chain.routing, *task.op, chunk, up_chunks(task.rows, chain.threads), c_.row_scratch[thread].data());
      case PG_EXPERTS_DOWN:
        return experts_down(c_, chain.routing, *task.op, chunk * task.step, task.step, c_.row_scratch[thread].data());
    }
    run_rows(chain, task, chunk * task.step, std::min(task.rows, (chunk + 1) * task.step), thread);
  }

  void run_tail(Chain& chain, const Item& item, int thread) {
    for (size_t i = item.tail_begin; i < item.tail_end; i++) run_rows(chain, chain.tails[i], 0, chain.tails[i].rows, thread);
  }

  void run_rows(Chain& chain, const Task& task, int64_t from, int64_t to, int thread) {
    for (int64_t i = from; i < to; i++) {
      const int64_t row = task.row + i, logit = task.first + i;
      if (task.kind == kRopeTables) rope_tables(row);
      else if (task.kind == kSample) sample(*task.op, logit, row, thread);
      else if (task.kind == PG_ROUTE) chain.routing.choose(*c_.kernels, i, c_.buffers[task.op->in].row(row), vector(task.op->vector), vector(task.op->vector2), c_.row_scratch[thread].data());
      else if (task.kind == kGroup) chain.routing.group();
      else run_row(task, row, logit, thread);
    }
  }

  void run_row(const Task& task, int64_t row, int64_t logit, int thread) {
    const pg_op& op = *task.op;
    const Kernels& k = *c_.kernels;
    float *in = op.in >= 0 ? c_.buffers[op.in].row(row) : nullptr, *out = op.out >= 0 ? c_.buffers[op.out].row(row) : nullptr;
    if (op.out >= 0 && !c_.buffers[op.out].f.data()) out = c_.row_values[thread].data();
    switch (task.kind) {
      case PG_EMBED: {
        const Weight& w = c_.weights[op.weight];
        const bool seen = st_.vector_of && st_.vector_of[row] >= 0;
        if (op.flags & PG_ADD) {
          float* values = c_.row_scratch[thread].data();
          k.dequantize_row(w.parts[0], w.k, seen ? op.layer : st_.tokens[row], values);
          for (int64_t i = 0; i < w.k; i++) out[i] += values[i] * op.f;
        } else if (seen) memcpy(out, vectors_of(row), w.k * sizeof(float));
        else {
          k.dequantize_row(w.parts[0], w.k, st_.tokens[row], out);
          for (int64_t i = 0; op.f > 0.0f && i < w.k; i++) out[i] *= op.f;
        }
        break;
      }
      case PG_NORM: {
        float* to = op.flags & PG_ADD ? in : out;
        in_parts(op, [&](int64_t at, int64_t n) { k.norm(in + at, vector(op.vector), n, op.f, to + at); });
        if (op.flags & PG_ADD) add_to(out, in, c_.buffers[op.in].width);
        for (int64_t i = 0; op.f2 != 0.0f && i < c_.buffers[op.out].width; i++) out[i] *= op.f2;
        break;
      }
      case PG_GATHER: memcpy(out, c_.buffers[op.in].row(st_.rows[logit]), c_.buffers[op.out].width * sizeof(float)); break;
      case PG_PATCHES: take_patch(st_, row, out, c_.buffers[op.out].width); break;
      case PG_LATENT_KEY: latent_key(c_, op, in, out); break;
      case PG_SILU: k.silu(in, in + c_.buffers[op.out].width, c_.buffers[op.out].width, out); break;
      case PG_ROPE: return rope(op, row);
      case PG_LAYER_NORM:
        in_parts(op, [&](int64_t at, int64_t n) { k.layer_norm(in + at, vector(op.vector), vector(op.vector2), n, op.f, out + at); });
        break;
      case PG_ADD_VECTORS:
        if (st_.vector_of && st_.vector_of[row] >= 0) add_to(out, vectors_of(row) + op.layer * c_.buffers[op.out].width, c_.buffers[op.out].width);
        break;
      case PG_GRID: add_grid_position(st_, row, vector(op.vector), op.layer, c_.buffers[op.out].width, out); break;
      case PG_ADD_SCALED: add_scaled(out, in, vector(op.vector), c_.buffers[op.out].width); break;
      case PG_GELU: k.gelu(in, c_.buffers[op.out].width, out); break;
      case PG_QUICK_GELU: k.quick_gelu(in, c_.buffers[op.out].width, out); break;
      case PG_GELU_TANH: k.gelu_tanh(in, c_.buffers[op.out].width, out); break;
      case PG_RELU2: relu2(in, c_.buffers[op.out].width, out); break;
      case PG_MEAN: mean_of_parts(in, op.layer, c_.buffers[op.out].width, out); break;
      case PG_GATED_GELU: gated(k.gelu, in, c_.buffers[op.out].width, out); break;
      case PG_GATED_GELU_TANH: gated(k.gelu_tanh, in, c_.buffers[op.out].width, out); break;
      case PG_POSITIONS: add_positions(op, row, out); break;
      case PG_NORM_GATED: norm_gated(c_, op, in, out); break;
      case PG_OUT_GATE: k.sigmoid_gate(in + op.layer, c_.buffers[op.out].width, out); break;
      case PG_ZERO: std::fill(out, out + c_.buffers[op.out].width, 0.0f); break;
      case PG_GELU_TIMES: times_gelu(k.gelu_tanh, in + op.layer, c_.buffers[op.out].width, out); break;
      case PG_GATED: gate(in, vector(op.vector), c_.buffers[op.in].width, out, c_.buffers[op.out].width); break;
      case PG_HIDDEN: {
        const int64_t width = c_.buffers[op.in].width;
        if (st_.out_hidden) memcpy(st_.out_hidden + logit * st_.hidden_width + op.layer * width, in, width * sizeof(float));
        return;
      }
    }
    if (op.order > 0) put_in_order(c_.orders[op.order - 1], out, c_.row_scratch[thread].data());
    if (op.flags & PG_QUANTIZE) make_forms(k, out, c_.buffers[op.out].width, c_.buffers[op.out].codes(row));
  }

  const float* vectors_of(int64_t token) const { return st_.vectors + (int64_t)st_.vector_of[token] * st_.vectors_width; }
  // Body(begin, size) of each part of a row.
  template <typename Body> void in_parts(const pg_op& op, Body body) const {
    const int64_t parts = std::max(1, op.layer), n = c_.buffers[op.out].width / parts;
    for (int64_t i = 0; i < parts; i++) body(i * n, n);
  }

  const float* vector(int32_t id) const { return id >= 0 ? c_.vectors[id].data() : nullptr; }
  float* logits(int64_t row) const { return reinterpret_cast<float*>(c_.logit_pages.data()) + row * c_.dims.vocab; }
  float* rope_row(int64_t token, bool local) const {
    float* first = reinterpret_cast<float*>(c_.rope_pages.data());
    const int64_t dim = c_.dims.rope_dim;
    return local ? first + c_.dims.max_tokens * dim + token * 2 * (int64_t)c_.local_inv_freq.size() : first + token * dim;
  }

  void quantize(const Buffer& b, int64_t row) { make_forms(*c_.kernels, b.row(row), b.width, b.codes(row)); }

  int request_of(int64_t token) const {
    return (int)(std::upper_bound(st_.starts, st_.starts + st_.requests + 1, (int32_t)token) - st_.starts) - 1;
  }
  int position_of(int64_t token) const {
    const int r = request_of(token);
    return st_.positions[r] + (int)(token - st_.starts[r]);
  }
  const int32_t* table_of(int r) const { return st_.block_tables + (int64_t)st_.slots[r] * st_.table_width; }

  // What pair i of a token's heads turns by.
  int rope_position(int64_t token, int i) const {
    if (!st_.rope_positions) return position_of(token);
    return st_.rope_positions[(int64_t)c_.rope_axes[i] * st_.tokens_count + token];
  }

  void rope_tables(int64_t token) {
    fill_table(token, c_.inv_freq, c_.dims.rope_factor, rope_row(token, false));
    if (!c_.local_inv_freq.empty()) fill_table(token, c_.local_inv_freq, c_.dims.local_factor, rope_row(token, true));
  }

  void fill_table(int64_t token, const std::vector<double>& inv_freq, float factor, float* table) {
    const int half = (int)inv_freq.size();
    for (int i = 0; i < half; i++) {
      const double angle = rope_position(token, i) * inv_freq[i];
      table[i] = (float)(std::cos(angle) * factor);
      table[half + i] = (float)(std::sin(angle) * factor);
    }
  }

  // `to`: where the task's first row goes.
  void multiply(const Chain& chain, const Task& task, int64_t chunk, float* to, int64_t stride) {
    const pg_op& op = *task.op;
    const Weight& w = c_.weights[op.weight];
    const Buffer& in = c_.buffers[op.in];
    const Codes codes = in.codes(task.row);
    const Rows a = {in.row(task.row), codes.q, codes.d, codes.s, codes.n, codes.h, codes.wide, codes.bf16, w.k};
    const Out out = {to, stride, vector(op.vector), (op.flags & PG_ADD) != 0};
    const Cut cut(w, task.rows, chain.threads);
    const int64_t block = chunk / cut.chunks, from = chunk % cut.chunks * cut.step, end = std::min(w.panels, from + cut.step);
    const int64_t r0 = task.rows * block / cut.row_blocks, r1 = task.rows * (block + 1) / cut.row_blocks;
    for (const Part& p : w.parts) {
      const int64_t p0 = std::max<int64_t>(0, from - p.first_panel), p1 = std::min(ceil_div(p.rows, kPanel), end - p.first_panel);
      if (p0 < p1) c_.kernels->matmul(p, p0, p1, a, r0, r1, out);
    }
  }

  void rope(const pg_op& op, int64_t token) {
    const float* cos = rope_row(token, op.flags & PG_LOCAL);
    turn_heads(c_, op, c_.buffers[op.in].row(token), cos, position_of(token), table_of(request_of(token)));
  }

  AttentionJob job(const pg_op& op, const Tokens& t, int head) const {
    const Heads& own = c_.heads_of(op);
    const KvCache& kv = own.kv;
    const Buffer &in = c_.buffers[op.in], &out = c_.buffers[op.out];
    const int group = c_.dims.heads / own.jobs;
    const int64_t row = st_.starts[t.request] + t.from, first = (int64_t)head * group;
    const float* sinks = vector(op.vector);
    return {&kv, table_of(t.request), op.layer, head * kv.heads / own.jobs, group, t.count, st_.positions[t.request] + t.from,
            in.row(row) + first * kv.head_dim, in.width, out.row(row) + first * kv.value_dim(), out.width, op.f,
            op.window > 0 ? op.window : INT32_MAX, sinks ? sinks + first : nullptr, op.f2,
            st_.last_seen ? st_.last_seen + row : nullptr};
  }

  void attention(Chain& chain, const pg_op& op, int64_t chunk, int thread) {
    AttentionJobs& jobs = chain.attention_of(op);
    const int heads = c_.heads_of(op).jobs, head = (int)(chunk % heads);
    const Tokens& t = jobs.tokens[chunk / heads];
    float* scratch = c_.row_scratch[thread].data();
    if (t.segment < 0) return c_.kernels->attention(job(op, t, head), scratch);
    c_.kernels->attention_segment(job(op, t, head), t.segment, &jobs.partials[(t.partials + head) * partial_stride(c_.heads_of(op).kv.head_dim)], scratch);
  }

  void join(Chain& chain, const pg_op& op, int64_t chunk, int thread) {
    AttentionJobs& jobs = chain.attention_of(op);
    const int heads = c_.heads_of(op).jobs, head = (int)(chunk % heads);
    const Join& j = jobs.joins[chunk / heads];
    const int64_t stride = partial_stride(c_.heads_of(op).kv.head_dim);
    c_.kernels->attention_join(job(op, j.tokens, head), &jobs.partials[(j.tokens.partials + head) * stride],
                               heads * stride, j.segments, c_.row_scratch[thread].data());
  }

  void add_positions(const pg_op& op, int64_t token, float* out) {
    const int r = request_of(token), position = position_of(token);
    const int64_t width = c_.buffers[op.out].width;
    const float *at = op.vector < 0 ? nullptr : vector(op.vector) + (position + op.layer) * width, *type = vector(op.vector2);
    if (type && st_.second_texts && position >= st_.second_texts[r]) type += width;
    for (int64_t i = 0; i < width; i++) out[i] += !type ? at[i] : !at ? type[i] : at[i] + type[i];
  }

  void attend_all(const Chain& chain, const Task& task, int64_t chunk, int thread) {
    const pg_dims& d = c_.dims;
    const pg_op& op = *task.op;
    const bool frames = op.flags & PG_FRAMES;
    const int64_t place = task.first + chunk;
    const Tokens& t = (frames ? chain.frames : chain.encoder)[place / d.heads];
    const int32_t* starts = (frames ? st_.frames : st_.starts) + t.request;
    const Buffer &in = c_.buffers[op.in], &out = c_.buffers[op.out];
    const int64_t first = starts[0], head = place % d.heads, column = head * d.head_dim;
    const float* keys = in.row(first) + (d.heads + head * d.kv_heads / d.heads) * d.head_dim;
    c_.kernels->attend_all({in.row(first + t.from) + column, keys, keys + (int64_t)d.kv_heads * d.head_dim, in.width, t.count,
                            starts[1] - starts[0], d.head_dim, t.from, op.window > 0 ? op.window : INT32_MAX, op.f,
                            out.row(first + t.from) + column, out.width, c_.heads.kv.kind == PG_KV_BF16}, c_.row_scratch[thread].data());
  }

  void sample(const pg_op& op, int64_t l, int64_t row, int thread) {
    float* values = logits(row);
    if (op.f2 > 0.0f) c_.kernels->soft_cap(values, c_.dims.vocab, op.f2);
    if (st_.out_logits) memcpy(st_.out_logits + l * c_.dims.vocab, values, c_.dims.vocab * sizeof(float));
    sample_row(*c_.kernels, st_, (int)l, values, c_.dims.vocab, c_.scratch[thread]);
  }

  pg_context& c_;
  const pg_step st_;
  bool in_order_ = false;
  std::optional<Clock::time_point> pause_;
  Clock::time_point last_;
  Clock::duration longest_{};
  std::atomic<size_t> end_{SIZE_MAX};  // of the items that may be worked on, while it pauses
  std::deque<Chain> chains_;
};

}  // namespace

// Whether the step can be run.
static bool accept(pg_context* c, const pg_step& st) {
  if (valid(*c, st)) return true;
  c->error = "a step plan that does not fit the model";
  return false;
}

extern "C" int32_t pg_start(pg_context* c, const pg_step* st) {
  pg_wait(c);
  if (!accept(c, *st)) return -1;
  c->kv_used = std::max(c->kv_used, c->used_bytes(*st));
  c->team.start(std::make_shared<StepJob>(*c, *st));
  return 0;
}

extern "C" void pg_wait(pg_context* c) { c->team.wait(); }

extern "C" int32_t pg_begin(pg_context* c, const pg_step* st) {
  if (!accept(c, *st)) return -1;
  c->begun = std::make_shared<StepJob>(*c, *st);
  return 0;
}

extern "C" int32_t pg_continue(pg_context* c, double seconds) {
  if (!c->begun) return 1;
  StepJob& job = static_cast<StepJob&>(*c->begun);
  job.go_on_until(Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds)));
  c->team.run(c->begun);
  if (!job.done()) return 0;
  c->begun.reset();
  return 1;
}
