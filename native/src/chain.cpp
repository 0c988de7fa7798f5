// Makes a chain of phases from the program and the step.
#include "chain.h"

#include <algorithm>

#include "latent_step.h"

namespace pagoda {
namespace {

constexpr int64_t kSerialRows = 2;
constexpr int64_t kChunkBytes = 32 << 10;  // of weights, at least: a chunk costs two atomic operations
constexpr int64_t kPairs = 1 << 22;        // of a query and a key, for each thread: then a step in parts may pause
constexpr int64_t kAdaptedRows = 16;       // of an adapter, that go together
constexpr int64_t kRowBytes = 192 << 10;   // activations that stay in the second-level cache while weights pass

}  // namespace

Cut::Cut(const Weight& w, int64_t rows, int threads) {
  const int64_t at_once = std::max<int64_t>(16, kRowBytes / w.k);
  row_blocks = ceil_div(rows, at_once);
  const int64_t fair = w.panels / (threads * (row_blocks > 2 ? 4 : 8));
  const int64_t small = rows > 4 ? 1 : ceil_div(kChunkBytes, w.parts[0].stride);
  step = std::max({(int64_t)1, fair, std::min(small, ceil_div(w.panels, threads))});
  step += step & 1;  // panels come in pairs
  chunks = ceil_div(w.panels, step);
}

Chain::Chain(const pg_context& c, const pg_step& st, int threads, Range tokens, Range logits, Range room)
    : threads(threads), routing(c.dims, tokens.begin, tokens.size()), c_(c), st_(st), tokens_(tokens), logits_(logits), room_(room) {
  items.reserve(2 * c.ops.size());
  if (c.heads.kv.data) list_attention(attention, c.heads);
  if (c.local_heads.kv.data) list_attention(local_attention, c.local_heads);
  add_phase(kStart, nullptr, 0, 0, 1, 1);
  add(kRopeTables, nullptr, tokens.size(), 0);
  const auto of_logits = [&](size_t i) { return (c.ops[i].flags & PG_LOGIT_ROWS) != 0; };
  for (size_t i = 0, next; i < c.ops.size(); i = next) {
    for (next = i + 1; next < c.ops.size() && of_logits(next) == of_logits(i);) next++;
    if (!of_logits(i)) { add_tokens(i, next); continue; }
    for (int64_t first = logits.begin; first < logits.end; first += room.size())  // as many as there is room for
      for (size_t j = i; j < next; j++) add(c.ops[j], first);
  }
}

// Operations over tokens: those that go by pieces, as long as they stand in a row, piece by piece.
void Chain::add_tokens(size_t begin, size_t end) {
  const auto pieces = [&](size_t i) { return (c_.ops[i].flags & PG_PIECES) != 0; };
  for (size_t i = begin, next; i < end; i = next) {
    for (next = i + 1; next < end && pieces(i) && pieces(next);) next++;
    const int64_t step = pieces(i) ? c_.dims.piece_rows : tokens_.size();
    for (int64_t row = tokens_.begin; row < tokens_.end; row += step) {
      rows_ = {row, std::min(row + step, tokens_.end)};
      for (size_t j = i; j < next; j++) add(c_.ops[j], logits_.begin);
    }
  }
  rows_ = tokens_;
}

void Chain::add_phase(int32_t kind, const pg_op* op, int64_t rows, int64_t first, int64_t step, int64_t chunks) {
  items.push_back({{kind, op, row_of(op), rows, first, step}, Phase(chunks, threads, counters_)});
}

// A task that goes row by row.
void Chain::add(int32_t kind, const pg_op* op, int64_t rows, int64_t first) {
  if (rows <= kSerialRows) {
    tails.push_back({kind, op, row_of(op), rows, first, rows});
    Item& last = items.back();
    if (!last.tail_end) last.tail_begin = tails.size() - 1;
    last.tail_end = tails.size();
    return;
  }
  const int64_t step = kind == kSample ? 1 : std::max<int64_t>(1, rows / (threads * 4));
  add_phase(kind, op, rows, first, step, ceil_div(rows, step));
}

void Chain::add(const pg_op& op, int64_t first) {
  const bool logits = op.flags & PG_LOGIT_ROWS;
  const int64_t rows = logits ? std::min(room_.size(), logits_.end - first) : rows_.size();
  if (rows <= 0) return;
  if (op.kind == PG_MATMUL || op.kind == PG_HEAD) {
    const Cut cut(c_.weights[op.weight], rows, threads);
    add_phase(op.kind, &op, rows, first, cut.step, cut.row_blocks * cut.chunks);
  } else if (op.kind == PG_ATTENTION) {
    const AttentionJobs& jobs = attention_of(op);
    const int64_t heads = c_.heads_of(op).jobs;
    add_phase(op.kind, &op, rows, first, 1, (int64_t)jobs.tokens.size() * heads);
    items.back().attention = (int)cached.size() - 1;
    if (!jobs.joins.empty()) add_phase(kJoin, &op, rows, first, 1, (int64_t)jobs.joins.size() * heads);
  } else if (op.kind == PG_DELTA) {
    add_phase(op.kind, &op, rows, first, 1, (int64_t)st_.requests * c_.dims.delta.key_heads);
  } else if (op.kind == PG_CONVOLVE) {
    add_phase(op.kind, &op, rows, first, 1, (int64_t)st_.requests * c_.dims.delta.parts);
  } else if (op.kind == PG_SCAN) {
    add_phase(op.kind, &op, rows, first, 1, (int64_t)st_.requests * c_.dims.delta.value_heads);
  } else if (op.kind == PG_ADAPT) {
    add_adapted(op, rows, first);
  } else if (op.kind == PG_ABSORB || op.kind == PG_EXPAND) {
    add_phase(op.kind, &op, rows, first, 1, ceil_div(rows, kHeadRows) * c_.dims.heads);
  } else if (op.kind == PG_ATTEND_ALL) {
    add_encoder_attention(op);
  } else if (op.kind == PG_EXPERTS_UP) {
    add_phase(op.kind, &op, rows, first, 1, up_chunks(rows, threads));
  } else if (op.kind == PG_EXPERTS_DOWN) {
    const Part& each = c_.weights[op.weight].parts[0];
    add_phase(op.kind, &op, rows, first, down_step(each, threads), ceil_div(panels_of(each.rows), down_step(each, threads)));
  } else {
    add(op.kind, &op, rows, first);
  }
  if (op.kind == PG_ROUTE) add(kGroup, &op, 1, first);
  if (op.kind == PG_ROPE) cached.push_back(items.size());
  if ((op.kind == PG_MATMUL || op.kind == PG_ATTENTION || op.kind == PG_ATTEND_ALL || op.kind == PG_DELTA || op.kind == PG_EXPAND) && op.flags & PG_QUANTIZE) add(kFinishRows, &op, rows, first);
  if (op.kind == PG_HEAD) add(kSample, &op, rows, first);
}

// Two products for each pair of small matrices; nothing where no row has an adapter.
void Chain::add_adapted(const pg_op& op, int64_t rows, int64_t first) {
  if (!st_.adapters) return;
  const bool again = listed_ && (listed_->flags & PG_LOGIT_ROWS) == (op.flags & PG_LOGIT_ROWS) && listed_row_ == row_of(&op) && listed_rows_ == rows && listed_first_ == first;
  if (!again) list_adapted(op, rows, first);
  const int64_t from = (int64_t)listed_from_, runs = (int64_t)adapted.size() - from;
  if (runs == 0) return;
  const int64_t slices = runs >= 2 * threads ? 1 : threads;
  add_phase(PG_ADAPT, &op, rows, from, 1, runs * op.layer);
  add_phase(kAdaptUp, &op, rows, from, slices, runs * slices);
}

void Chain::list_adapted(const pg_op& op, int64_t rows, int64_t first) {
  listed_ = &op, listed_row_ = row_of(&op), listed_rows_ = rows, listed_first_ = first, listed_from_ = adapted.size();
  for (const Adapter& each : c_.adapters) small_width = std::max(small_width, each.ranks);
  small.resize(std::max<size_t>(small.size(), rows * small_width));
  int request = 0;
  for (int64_t i = 0; i < rows; i++) {
    const int64_t row = listed_row_ + i;
    if (op.flags & PG_LOGIT_ROWS) request = st_.row_request[first + i];
    else while (row >= st_.starts[request + 1]) request++;
    const int32_t place = st_.adapters[request];
    if (place < 0) continue;
    Adapted* last = adapted.size() > listed_from_ ? &adapted.back() : nullptr;
    if (last && last->place == place && last->row + last->rows == row && last->rows < kAdaptedRows) last->rows++;
    else adapted.push_back({place, row, 1});
  }
}

// The last tokens, which have the most to read, come first, so that the threads end together.
void Chain::list_attention(AttentionJobs& jobs, const Heads& heads) {
  const int width = std::max(1, kQueryVectors / (c_.dims.heads / heads.jobs));
  for (int r = 0; r < st_.requests; r++) {
    const int from = (int)std::max<int64_t>(0, tokens_.begin - st_.starts[r]);
    const int tokens = (int)std::min<int64_t>(st_.starts[r + 1], tokens_.end) - st_.starts[r] - from;
    for (int tile = (int)ceil_div(tokens, width) - 1; tile >= 0 && tokens > 0; tile--)
      jobs.tokens.push_back({r, from + tile * width, std::min(width, tokens - tile * width)});
  }
  if ((int64_t)jobs.tokens.size() * heads.jobs < 4 * threads && threads > 1) split_attention(jobs, heads);
}

// Few jobs: cut those with a long context into segments, so that all threads have work.
void Chain::split_attention(AttentionJobs& jobs, const Heads& heads) {
  std::vector<Tokens> whole;
  whole.swap(jobs.tokens);
  int64_t parts = 0;
  for (Tokens t : whole) {
    const int end = st_.last_seen ? st_.last_seen[st_.starts[t.request] + t.from + t.count - 1] + 1 : st_.positions[t.request] + t.from + t.count;
    const int segments = (int)ceil_div(end, kSegment);
    if (segments == 1) { jobs.tokens.push_back(t); continue; }
    t.partials = parts;
    jobs.joins.push_back({t, segments});
    for (t.segment = 0; t.segment < segments; t.segment++, t.partials = parts += heads.jobs) jobs.tokens.push_back(t);
  }
  jobs.partials.resize(parts * partial_stride(heads.kv.head_dim));
}

// A chunk is a job times a head; a phase takes some, from its `first` on: at least one for each thread.
void Chain::add_encoder_attention(const pg_op& op) {
  const bool by_frame = op.flags & PG_FRAMES;
  const int32_t* starts = by_frame ? st_.frames : st_.starts;
  std::vector<Tokens>& jobs = by_frame ? frames : encoder;
  if (jobs.empty()) jobs = encoder_jobs(starts, by_frame ? st_.frames_count : st_.requests);
  const int64_t heads = c_.dims.heads, chunks = (int64_t)jobs.size() * heads;
  for (int64_t from = 0, to = 0; from < chunks; from = to) {
    for (int64_t pairs = 0; to < chunks && (pairs < kPairs * threads || to - from < threads); to++) {
      const Tokens& job = jobs[to / heads];
      pairs += (int64_t)job.count * (starts[job.request + 1] - starts[job.request]);
    }
    add_phase(op.kind, &op, rows_.size(), from, 1, to - from);
  }
}

// An encoder's attention is cut into some consecutive tokens of a request, or of a frame, times heads.
std::vector<Tokens> Chain::encoder_jobs(const int32_t* starts, int count) {
  std::vector<Tokens> jobs;
  for (int r = 0; r < count; r++)
    for (int from = 0, tokens = starts[r + 1] - starts[r]; from < tokens; from += kEncoderQueries)
      jobs.push_back({r, from, std::min(kEncoderQueries, tokens - from)});
  return jobs;
}

}  // namespace pagoda
