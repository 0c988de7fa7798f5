// Running a step: a list of phases made from the program, each cut into chunks that threads take; a thread that comes
// late passes over what is done.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>

#include "context.h"

using namespace pagoda;

namespace {

constexpr int64_t kSerialRows = 2;
constexpr int64_t kChunkBytes = 32 << 10;  // of weights, at least: a chunk costs two atomic operations
constexpr int64_t kRowBytes = 192 << 10;  // activations that stay in the second-level cache while weights pass

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How a product is cut: blocks of rows times chunks of panels.
struct Cut {
  Cut(const Weight& w, int64_t rows, int threads) {
    const int64_t at_once = std::max<int64_t>(16, kRowBytes / w.k);
    row_blocks = ceil_div(rows, at_once);
    const int64_t fair = w.panels / (threads * (row_blocks > 2 ? 4 : 8));
    const int64_t small = rows > 4 ? 1 : ceil_div(kChunkBytes, w.parts[0].stride);
    step = std::max({(int64_t)1, fair, std::min(small, ceil_div(w.panels, threads))});
    step += step & 1;  // panels come in pairs
    chunks = ceil_div(w.panels, step);
  }
  int64_t row_blocks, step, chunks;
};

class StepJob : public Job {
 public:
  StepJob(pg_context& c, const pg_step& st) : c_(c), st_(st), threads_(c.team.size()) {
    if (c.kv.data) list_attention();
    add_phase({kStart, nullptr, 0, 0, 1}, 1);
    add(kRopeTables, nullptr, st.tokens_count);
    size_t gather = c.ops.size();
    for (size_t i = 0; i < c.ops.size(); i++) {
      if (c.ops[i].kind == PG_GATHER) gather = i;
      add(c.ops[i], 0);
    }
    // the head takes max_rows rows of logits at a time
    for (int64_t first = c.dims.max_rows; first < st.rows_count; first += c.dims.max_rows)
      for (size_t i = gather; i < c.ops.size(); i++) add(c.ops[i], first);
  }

  void work(int thread) override {
    for (Item& item : items_)
      item.phase.share(thread, [&](int64_t chunk) { run(item.task, chunk, thread); }, [&] { run_tail(item, thread); });
  }

 private:
  enum Extra : int32_t { kStart = 100, kRopeTables, kJoin, kFinishRows, kSample };  // tasks besides pg_op_kind

  struct Task {
    int32_t kind;
    const pg_op* op;
    int64_t first;  // row of logits that is row 0 of the buffers
    int64_t rows, step;
  };
  // A phase, and the small tasks behind it that its last thread does at once: to hand them over would take longer.
  struct Item {
    Item(const Task& task, int64_t chunks, int threads) : task(task), phase(chunks, threads) {}
    Task task;
    Phase phase;
    size_t tail_begin = 0, tail_end = 0;  // in tails_
  };

  void add_phase(const Task& task, int64_t chunks) { items_.emplace_back(task, chunks, threads_); }

  // A task that goes row by row.
  void add(int32_t kind, const pg_op* op, int64_t rows, int64_t first = 0) {
    if (rows <= kSerialRows) {
      tails_.push_back({kind, op, first, rows, rows});
      Item& last = items_.back();
      if (!last.tail_end) last.tail_begin = tails_.size() - 1;
      last.tail_end = tails_.size();
      return;
    }
    const int64_t step = kind == kSample ? 1 : std::max<int64_t>(1, rows / (threads_ * 4));
    add_phase({kind, op, first, rows, step}, ceil_div(rows, step));
  }

  void add(const pg_op& op, int64_t first) {
    const bool logits = op.flags & PG_LOGIT_ROWS;
    const int64_t rows = logits ? std::min<int64_t>(c_.dims.max_rows, st_.rows_count - first) : st_.tokens_count;
    if (rows <= 0) return;
    if (op.kind == PG_MATMUL || op.kind == PG_HEAD) {
      const Cut cut(c_.weights[op.weight], rows, threads_);
      add_phase({op.kind, &op, first, rows, cut.step}, cut.row_blocks * cut.chunks);
    } else if (op.kind == PG_ATTENTION) {
      add_phase({op.kind, &op, first, rows, 1}, (int64_t)attention_.size() * c_.dims.kv_heads);
    } else if (op.kind == PG_ATTEND_ALL) {
      if (encoder_.empty()) list_encoder();
      add_phase({op.kind, &op, first, rows, 1}, (int64_t)encoder_.size() * c_.dims.heads);
      if (op.flags & PG_QUANTIZE) add(kFinishRows, &op, rows);
    } else {
      add(op.kind, &op, rows, first);
    }
    if (op.kind == PG_ATTENTION && !joins_.empty())
      add_phase({kJoin, &op, first, rows, 1}, (int64_t)joins_.size() * c_.dims.kv_heads);
    if (op.kind == PG_ATTENTION && op.flags & PG_QUANTIZE) add(kFinishRows, &op, rows);
    if (op.kind == PG_HEAD) add(kSample, &op, rows, first);
  }

  void run(const Task& task, int64_t chunk, int thread) {
    switch (task.kind) {
      case kStart: return;
      case PG_MATMUL: return multiply(task, chunk, c_.buffers[task.op->out].row(0), c_.buffers[task.op->out].width);
      case PG_HEAD: return multiply(task, chunk, logits(0), c_.dims.vocab);
      case PG_ATTENTION: return attention(*task.op, chunk, thread);
      case kJoin: return join(*task.op, chunk, thread);
      case PG_ATTEND_ALL: return attend_all(*task.op, chunk, thread);
    }
    run_rows(task, chunk * task.step, std::min(task.rows, (chunk + 1) * task.step), thread);
  }

  void run_tail(const Item& item, int thread) {
    for (size_t i = item.tail_begin; i < item.tail_end; i++) run_rows(tails_[i], 0, tails_[i].rows, thread);
  }

  void run_rows(const Task& task, int64_t from, int64_t to, int thread) {
    for (int64_t row = from; row < to; row++)
      if (task.kind == kRopeTables) rope_table(row);
      else if (task.kind == kSample) sample(task.first, row, thread);
      else run_row(task, row, thread);
  }

  void run_row(const Task& task, int64_t row, int thread) {
    const pg_op& op = *task.op;
    const Kernels& k = *c_.kernels;
    float *in = op.in >= 0 ? c_.buffers[op.in].row(row) : nullptr, *out = op.out >= 0 ? c_.buffers[op.out].row(row) : nullptr;
    switch (task.kind) {
      case PG_EMBED: {
        const Weight& w = c_.weights[op.weight];
        k.dequantize_row(w.parts[0], w.k, st_.tokens[row], out);
        break;
      }
      case PG_NORM: k.norm(in, vector(op.vector), c_.buffers[op.in].width, op.f, out); break;
      case PG_GATHER:
        memcpy(out, c_.buffers[op.in].row(st_.rows[task.first + row]), c_.buffers[op.in].width * sizeof(float));
        break;
      case PG_SILU: k.silu(in, in + c_.buffers[op.out].width, c_.buffers[op.out].width, out); break;
      case PG_ROPE: return rope(op, row);
      case PG_LAYER_NORM: k.layer_norm(in, vector(op.vector), vector(op.vector2), c_.buffers[op.in].width, op.f, out); break;
      case PG_GELU: k.gelu(in, c_.buffers[op.out].width, out); break;
      case PG_POSITIONS: add_positions(op, row, out); break;
      case PG_HIDDEN: {
        const int64_t width = c_.buffers[op.in].width;
        if (st_.out_hidden) memcpy(st_.out_hidden + (task.first + row) * width, in, width * sizeof(float));
        return;
      }
    }
    if (op.order > 0) put_in_order(c_.orders[op.order - 1], out, c_.row_scratch[thread].data());
    if (op.flags & PG_QUANTIZE) quantize(c_.buffers[op.out], row);
  }

  static void put_in_order(const std::vector<int32_t>& places, float* row, float* scratch) {
    memcpy(scratch, row, places.size() * sizeof(float));
    for (size_t i = 0; i < places.size(); i++) row[i] = scratch[places[i]];
  }

  const float* vector(int32_t id) const { return id >= 0 ? c_.vectors[id].data() : nullptr; }
  float* logits(int64_t row) const { return reinterpret_cast<float*>(c_.logit_pages.data()) + row * c_.dims.vocab; }
  float* rope_row(int64_t token) const { return reinterpret_cast<float*>(c_.rope_pages.data()) + token * c_.dims.rope_dim; }

  void quantize(const Buffer& b, int64_t row) { c_.kernels->quantize(b.row(row), b.width, b.codes(row)); }

  int request_of(int64_t token) const {
    return (int)(std::upper_bound(st_.starts, st_.starts + st_.requests + 1, (int32_t)token) - st_.starts) - 1;
  }
  int position_of(int64_t token) const {
    const int r = request_of(token);
    return st_.positions[r] + (int)(token - st_.starts[r]);
  }
  const int32_t* table_of(int r) const { return st_.block_tables + (int64_t)st_.slots[r] * st_.table_width; }

  void rope_table(int64_t token) {
    const int half = c_.dims.rope_dim / 2;
    float* table = rope_row(token);
    for (int i = 0; i < half; i++) {
      const double angle = position_of(token) * c_.inv_freq[i];
      table[i] = (float)(std::cos(angle) * c_.dims.rope_factor);
      table[half + i] = (float)(std::sin(angle) * c_.dims.rope_factor);
    }
  }

  void multiply(const Task& task, int64_t chunk, float* to, int64_t stride) {
    const pg_op& op = *task.op;
    const Weight& w = c_.weights[op.weight];
    const Buffer& in = c_.buffers[op.in];
    const Codes codes = in.codes(0);
    const Rows a = {in.row(0), codes.q, codes.d, codes.s, codes.n, codes.h, w.k};
    const Out out = {to, stride, vector(op.vector), (op.flags & PG_ADD) != 0};
    const Cut cut(w, task.rows, threads_);
    const int64_t block = chunk / cut.chunks, from = chunk % cut.chunks * cut.step, end = std::min(w.panels, from + cut.step);
    const int64_t r0 = task.rows * block / cut.row_blocks, r1 = task.rows * (block + 1) / cut.row_blocks;
    for (const Part& p : w.parts) {
      const int64_t p0 = std::max<int64_t>(0, from - p.first_panel), p1 = std::min(ceil_div(p.rows, kPanel), end - p.first_panel);
      if (p0 < p1) c_.kernels->matmul(p, p0, p1, a, r0, r1, out);
    }
  }

  // Norms and rotation of one token's heads; its keys and values go to the cache.
  void rope(const pg_op& op, int64_t token) {
    const pg_dims& d = c_.dims;
    const float* cos = rope_row(token);
    float* row = c_.buffers[op.in].row(token);
    for (int h = 0; h < d.heads + d.kv_heads; h++) {
      const float* weight = vector(h < d.heads ? op.vector : op.vector2);
      if (weight) c_.kernels->norm(row + h * d.head_dim, weight, d.head_dim, op.f, row + h * d.head_dim);
      c_.kernels->rotate(row + h * d.head_dim, cos, cos + d.rope_dim / 2, d.rope_dim, d.rope_interleaved != 0);
    }
    const int position = position_of(token);
    const int64_t block = table_of(request_of(token))[position / kTokens];
    const float *k = row + d.heads * d.head_dim, *v = k + d.kv_heads * d.head_dim;
    for (int h = 0; h < d.kv_heads; h++)
      c_.kernels->store_kv(c_.kv, op.layer, block, h, position % kTokens, k + h * d.head_dim, v + h * d.head_dim);
  }

  // Attention is cut into a few consecutive tokens of a request times KV heads; the last tokens, which have the most
  // to read, come first, so that the threads end together.
  struct Tokens {
    int request, from, count;
    int segment = -1;      // -1: all of them
    int64_t partials = 0;  // where its results go, per KV head, in widths of a job
  };
  struct Join {
    Tokens tokens;
    int segments;
  };

  void list_attention() {
    const int width = std::max(1, kQueryVectors / (c_.dims.heads / c_.dims.kv_heads));
    for (int r = 0; r < st_.requests; r++) {
      const int tokens = st_.starts[r + 1] - st_.starts[r];
      for (int tile = (int)ceil_div(tokens, width) - 1; tile >= 0; tile--)
        attention_.push_back({r, tile * width, std::min(width, tokens - tile * width)});
    }
    if ((int64_t)attention_.size() * c_.dims.kv_heads < 4 * threads_ && threads_ > 1) split_attention();
  }

  // Few jobs: cut those with a long context into segments, so that all threads have work.
  void split_attention() {
    std::vector<Tokens> whole;
    whole.swap(attention_);
    int64_t partials = 0;
    for (Tokens t : whole) {
      const int segments = (int)ceil_div(st_.positions[t.request] + t.from + t.count, kSegment);
      if (segments == 1) { attention_.push_back(t); continue; }
      t.partials = partials;
      joins_.push_back({t, segments});
      for (t.segment = 0; t.segment < segments; t.segment++, t.partials = partials += c_.dims.kv_heads) attention_.push_back(t);
    }
    partials_.resize(partials * partial_stride());
  }

  int64_t partial_stride() const { return (int64_t)kQueryVectors * (c_.dims.head_dim + 2); }

  AttentionJob job(const pg_op& op, const Tokens& t, int head) const {
    const pg_dims& d = c_.dims;
    const Buffer &in = c_.buffers[op.in], &out = c_.buffers[op.out];
    const int group = d.heads / d.kv_heads;
    const int64_t row = st_.starts[t.request] + t.from, column = (int64_t)head * group * d.head_dim;
    return {&c_.kv, table_of(t.request), op.layer, head, group, t.count, st_.positions[t.request] + t.from,
            in.row(row) + column, in.width, out.row(row) + column, out.width, op.f,
            op.window > 0 ? op.window : INT32_MAX};
  }

  void attention(const pg_op& op, int64_t chunk, int thread) {
    const Tokens& t = attention_[chunk / c_.dims.kv_heads];
    const int head = (int)(chunk % c_.dims.kv_heads);
    float* scratch = c_.row_scratch[thread].data();
    if (t.segment < 0) return c_.kernels->attention(job(op, t, head), scratch);
    c_.kernels->attention_segment(job(op, t, head), t.segment, &partials_[(t.partials + head) * partial_stride()], scratch);
  }

  void join(const pg_op& op, int64_t chunk, int thread) {
    const Join& j = joins_[chunk / c_.dims.kv_heads];
    const int head = (int)(chunk % c_.dims.kv_heads);
    c_.kernels->attention_join(job(op, j.tokens, head), &partials_[(j.tokens.partials + head) * partial_stride()],
                               c_.dims.kv_heads * partial_stride(), j.segments, c_.row_scratch[thread].data());
  }

  void add_positions(const pg_op& op, int64_t token, float* out) {
    const int r = request_of(token), position = position_of(token);
    const int64_t width = c_.buffers[op.out].width;
    const float* at = vector(op.vector) + (position + op.layer) * width;
    const float* type = vector(op.vector2) + (st_.second_texts && position >= st_.second_texts[r] ? width : 0);
    for (int64_t i = 0; i < width; i++) out[i] += at[i] + type[i];
  }

  // An encoder's attention is cut into some consecutive tokens of a request times heads.
  void list_encoder() {
    for (int r = 0; r < st_.requests; r++)
      for (int from = 0, tokens = st_.starts[r + 1] - st_.starts[r]; from < tokens; from += kEncoderQueries)
        encoder_.push_back({r, from, std::min(kEncoderQueries, tokens - from)});
  }

  void attend_all(const pg_op& op, int64_t chunk, int thread) {
    const pg_dims& d = c_.dims;
    const Tokens& t = encoder_[chunk / d.heads];
    const Buffer &in = c_.buffers[op.in], &out = c_.buffers[op.out];
    const int64_t first = st_.starts[t.request], column = chunk % d.heads * d.head_dim, hidden = (int64_t)d.heads * d.head_dim;
    const float* keys = in.row(first) + hidden + column;
    c_.kernels->attend_all({in.row(first + t.from) + column, keys, keys + hidden, in.width, t.count,
                            st_.starts[t.request + 1] - st_.starts[t.request], d.head_dim, op.f,
                            out.row(first + t.from) + column, out.width}, c_.row_scratch[thread].data());
  }

  void sample(int64_t first, int64_t l, int thread) {
    float* row = logits(l);
    if (st_.out_logits) memcpy(st_.out_logits + (first + l) * c_.dims.vocab, row, c_.dims.vocab * sizeof(float));
    sample_row(*c_.kernels, st_, (int)(first + l), row, c_.dims.vocab, c_.scratch[thread]);
  }

  pg_context& c_;
  const pg_step st_;
  const int threads_;
  std::vector<Tokens> attention_, encoder_;
  std::vector<Join> joins_;
  std::vector<float> partials_;
  std::deque<Item> items_;
  std::vector<Task> tails_;
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
  c->team.run(std::make_shared<StepJob>(*c, *st));
  return 0;
}
