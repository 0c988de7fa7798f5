// A chain: the phases that take some consecutive rows of a step through the whole program, each cut into chunks.
#pragma once
#include "experts.h"

namespace pagoda {

// How a product is cut: blocks of rows times chunks of panels.
struct Cut {
  Cut(const Weight& w, int64_t rows, int threads);
  int64_t row_blocks, step, chunks;
};

enum Extra : int32_t { kStart = 100, kRopeTables, kJoin, kFinishRows, kSample, kGroup, kAdaptUp };  // tasks besides pg_op_kind

struct Task {
  int32_t kind;
  const pg_op* op;
  int64_t row, rows;  // of the buffers
  int64_t first;      // row of logits that is row `row` of the buffers; or the first chunk of an encoder's attention
  int64_t step;       // rows of a chunk
};

// A phase, and the small tasks behind it that its last thread does at once: to hand them over would take longer.
struct Item {
  Task task;
  Phase phase;
  size_t tail_begin = 0, tail_end = 0;  // in the chain's tails
  int attention = -1;                   // which of the program's attentions it is
};

// Attention is cut into a few consecutive tokens of a request times KV heads.
struct Tokens {
  int request, from, count;
  int segment = -1;      // -1: all of them
  int64_t partials = 0;  // where its results go, per KV head, in widths of a job
};
struct Join {
  Tokens tokens;
  int segments;
};
struct AttentionJobs {  // in layers of a kind
  std::vector<Tokens> tokens;
  std::vector<Join> joins;
  std::vector<float> partials;
};

// Consecutive rows of the buffers with one adapter.
struct Adapted {
  int32_t place;
  int64_t row, rows;
};

// Rows [begin, end) of a step's tokens, or of its logits.
struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

class Chain {
 public:
  // `room`: rows of the buffers of logits that are the chain's.
  Chain(const pg_context& c, const pg_step& st, int threads, Range tokens, Range logits, Range room);

  const int threads;
  std::vector<Item> items;
  std::vector<Task> tails;
  std::vector<size_t> cached;  // for each attention of the program: the item after which the cache has the rows' keys
  AttentionJobs attention, local_attention;
  AttentionJobs& attention_of(const pg_op& op) { return &c_.heads_of(op) == &c_.heads ? attention : local_attention; }
  std::vector<Tokens> encoder, frames;
  std::vector<Adapted> adapted;
  std::vector<float> small;  // what adapters make of rows, between their two products
  int64_t small_width = 0;   // room for a row
  Routing routing;

 private:
  void add(const pg_op& op, int64_t first);
  void add_tokens(size_t begin, size_t end);
  void add(int32_t kind, const pg_op* op, int64_t rows, int64_t first);
  void add_phase(int32_t kind, const pg_op* op, int64_t rows, int64_t first, int64_t step, int64_t chunks);
  void add_encoder_attention(const pg_op& op);
  void add_adapted(const pg_op& op, int64_t rows, int64_t first);
  void list_adapted(const pg_op& op, int64_t rows, int64_t first);
  void list_attention(AttentionJobs& jobs, const Heads& heads);
  void split_attention(AttentionJobs& jobs, const Heads& heads);
  static std::vector<Tokens> encoder_jobs(const int32_t* starts, int count);
  int64_t row_of(const pg_op* op) const { return op && op->flags & PG_LOGIT_ROWS ? room_.begin : rows_.begin; }

  const pg_context& c_;
  const pg_step& st_;
  const Range tokens_, logits_, room_;
  Range rows_ = tokens_;  // that operations are added for: a piece of the tokens, or all
  CounterPool counters_;
  const pg_op* listed_ = nullptr;  // whose rows `adapted` ends with, from that one on
  int64_t listed_row_ = -1, listed_rows_ = 0, listed_first_ = 0;
  size_t listed_from_ = 0;
};

constexpr int64_t partial_stride(int head_dim) { return (int64_t)kQueryVectors * (head_dim + 2); }

}  // namespace pagoda
