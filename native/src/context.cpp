// Loading: weights, program, memory.
#include "context.h"

#include <algorithm>
#include <new>
#include <sys/mman.h>

#include "adapt.h"
#include "delta_step.h"
#include "latent_step.h"
#include "isa.h"

using namespace pagoda;

namespace pagoda {

Pages::Pages(int64_t bytes, bool huge) : bytes_(bytes) {
  if (bytes <= 0) return;
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  data_ = static_cast<uint8_t*>(p);
  if (huge) madvise(data_, bytes, MADV_HUGEPAGE);  // only advice: without it all is the same, but slower
}

Pages::~Pages() {
  if (data_) munmap(data_, bytes_);
}

bool Pages::touch(int64_t from, int64_t to) const {
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23  // since Linux 5.14
#endif
  return madvise(data_ + from, to - from, MADV_POPULATE_WRITE) == 0;
}

void Pages::release() const {
  if (data_) madvise(data_, bytes_, MADV_DONTNEED);
}

// Pages are reserved in large pieces, and taken from the system only as they are written.
uint8_t* Arena::take(int64_t bytes) {
  constexpr int64_t piece = 256 << 20, line = 64;
  used_ += bytes;
  bytes = (bytes + line - 1) / line * line;
  if (bytes > free_) {
    pages_.emplace_back(std::max(bytes, piece), true);
    free_ = pages_.back().bytes();
  }
  const Pages& last = pages_.back();
  uint8_t* at = last.data() + last.bytes() - free_;
  free_ -= bytes;
  return at;
}

}  // namespace pagoda

namespace {

constexpr int64_t kHuge = 2 << 20;

bool runs(int32_t type, int64_t k) {
  if (is_float(type)) return true;
  const Layout l = layout_of(type);
  return l.block > 0 && k % (l.header ? kSuper * kBlock : kBlock) == 0;
}

bool quantizes(const pg_part& p) {
  return p.quantize == 0 || (is_float(p.type) && (p.quantize == PG_Q8_0 || p.quantize == PG_Q5_1 || p.quantize == PG_Q4_1));
}

// 16 panels a chunk.
struct Repack : Job {
  Repack(const pg_part& from, uint8_t* to, int64_t panels, int threads) : from(from), to(to), panels(panels), phase((panels + 15) / 16, threads, counters) {}
  void work(int thread) override {
    phase.share(thread, [&](int64_t i) { repack(from, to, 16 * i, std::min(panels, 16 * i + 16)); }, [] {});
  }
  const pg_part from;
  uint8_t* const to;
  const int64_t panels;
  CounterPool counters;
  Phase phase;
};

// Call body, turning a lack of memory into an error text.
template <typename Body> int32_t guarded(pg_context* c, Body body) {
  try {
    return body();
  } catch (const std::bad_alloc&) {
    c->error = "out of memory";
    return -1;
  }
}

// 0, or -1 for a part that cannot run.
int32_t extend(pg_context* c, Weight& w, const pg_part* parts, int32_t n) {
  for (int i = 0; i < n; i++) {
    const pg_part& p = parts[i];
    if (!quantizes(p) || !runs(panel_type(p), p.k) || p.k != w.k || p.rows <= 0) {
      c->error = "a matrix of a type or shape that cannot run";
      return -1;
    }
    const int64_t panels = panels_of(p.rows), stride = panel_bytes(panel_type(p), p.k);
    uint8_t* data = c->arena.take(panels * stride);
    w.parts.push_back({panel_type(p), p.rows, w.rows, w.panels, stride, data});
    w.rows += p.rows, w.panels += panels;
    c->team.run(std::make_shared<Repack>(p, data, panels, c->team.size()));
  }
  return 0;
}

// Whose weights give the form that is read of the input.
bool is_product(const pg_op& op) {
  return op.kind == PG_MATMUL || op.kind == PG_HEAD || op.kind == PG_EXPERTS_UP || op.kind == PG_EXPERTS_DOWN;
}

// Let the last operation that writes the input of a product make the form that it reads, once.
void mark_producers(pg_context& c) {
  std::vector<pg_op*> producers(c.buffers.size());
  for (pg_op& op : c.ops) {
    if (is_product(op))
      for (const Part& p : c.weights[op.weight].parts)
        if (form_of(*c.kernels, p.type, c.weights[op.weight].k) != Form::floats) producers[op.in]->flags |= PG_QUANTIZE;
    if (op.out >= 0) producers[op.out] = &op;
  }
}

// What is read of buffer `i`.
struct Reads {
  bool floats, codes, wide, bf16;
};

Reads reads_of(const pg_context& c, int i) {
  Reads reads = {};
  bool made = false;
  for (const pg_op& op : c.ops) {
    const bool by_row = (op.kind == PG_NORM && !(op.flags & PG_ADD)) || op.kind == PG_LAYER_NORM || op.kind == PG_SILU || op.kind == PG_GELU ||
                        op.kind == PG_QUICK_GELU || op.kind == PG_GELU_TANH || op.kind == PG_RELU2 ||
                        op.kind == PG_GATED_GELU_TANH || op.kind == PG_GATED_GELU;  // writes a row, and reads no other of `out`
    const bool product = op.kind == PG_MATMUL || op.kind == PG_HEAD;
    made |= op.out == i && by_row && op.flags & PG_QUANTIZE;
    reads.floats |= (op.out == i && !(by_row && op.flags & PG_QUANTIZE)) || (op.in == i && !product);
    if (op.in != i || !is_product(op)) continue;
    for (const Part& p : c.weights[op.weight].parts) {
      const Form form = form_of(*c.kernels, p.type, c.weights[op.weight].k);
      reads.floats |= form == Form::floats, reads.codes |= form == Form::codes, reads.bf16 |= form == Form::bf16;
      reads.wide |= is_signed(p.type) && c.kernels->wide;
    }
  }
  reads.floats |= !made;
  return reads;
}

Heads make_heads(const pg_context& c, int layers, int kv_heads, int head_dim, int rope_dim) {
  const pg_dims& d = c.dims;
  const bool no_pairs = !c.kernels->to_bf16 || d.latent.rank;  // keys that are values too are not kept in pairs
  const int group = d.heads / kv_heads;
  int cuts = 1;
  while (group % cuts || group / cuts > kQueryVectors) cuts++;
  return {{nullptr, layers, kv_heads, head_dim, d.kv == PG_KV_BF16 && no_pairs ? PG_KV_F16 : d.kv, d.latent.rank ? head_dim - d.latent.rank : 0},
          kv_heads * cuts, rope_dim};
}

// The caches of both kinds of layers lie side by side in each block.
void make_caches(pg_context& c) {
  const pg_dims& d = c.dims;
  c.heads = make_heads(c, d.layers, d.kv_heads, d.head_dim, d.rope_dim);
  if (d.local.head_dim) c.local_heads = make_heads(c, d.local.layers, d.local.kv_heads, d.local.head_dim, d.local.rope_dim);
  const int64_t own = c.heads.kv.own_bytes(), block = own + c.local_heads.kv.own_bytes();
  c.kv_pages = Pages(block * d.num_blocks, true);
  c.heads.kv.data = c.kv_pages.data(), c.heads.kv.block_bytes = block;
  if (c.heads.kv.data) c.local_heads.kv.data = c.heads.kv.data + own, c.local_heads.kv.block_bytes = block;
}

Buffer make_buffer(const pg_buffer& from, const pg_dims& d, Reads reads) {
  const int64_t sizes[] = {d.max_tokens, d.max_rows, d.piece_rows}, rows = sizes[from.rows], blocks = from.width / kBlock;
  Buffer b{from.width, rows, {}, {}, {}, {}, {}, {}, {}, {}};
  if (reads.floats) b.f = Pages(rows * from.width * 4 + 32);
  if (reads.bf16) b.bf16 = Pages(rows * from.width * 2);
  if (from.width % kBlock == 0 && (reads.codes || !reads.bf16)) {  // where none is read: pages that nobody touches cost nothing
    b.q = Pages(rows * from.width), b.d = Pages(rows * blocks * 4);
    b.s = Pages(rows * blocks * 4), b.n = Pages(rows * blocks * 4), b.h = Pages(rows * blocks * 8);
    if (reads.wide) b.wide = Pages(rows * from.width * 2);
  }
  return b;
}

}  // namespace

int64_t pg_context::used_bytes(const pg_step& st) const {
  int32_t last = -1;
  for (int r = 0; r < st.requests && heads.kv.data; r++) {
    const int32_t* table = st.block_tables + (int64_t)st.slots[r] * st.table_width;
    const int first = st.positions[r] / kTokens, end = (st.positions[r] + st.starts[r + 1] - st.starts[r] - 1) / kTokens + 1;
    last = std::max(last, *std::max_element(table + first, table + end));
  }
  return (last + 1) * heads.kv.block_bytes;
}

extern "C" {

pg_context* pg_create(int32_t threads, const char* isa) {
  const Kernels* k = find_kernels(isa);
  return k && threads > 0 ? new pg_context(threads, k) : nullptr;
}

void pg_destroy(pg_context* c) {
  pg_wait(c);
  delete c;
}
const char* pg_error(pg_context* c) { return c->error.c_str(); }

int64_t pg_matrix_bytes(int32_t type, int64_t rows, int64_t k) {
  return runs(type, k) ? panels_of(rows) * panel_bytes(type, k) : -1;
}

int32_t pg_weight(pg_context* c, const pg_part* parts, int32_t n) {
  return guarded(c, [&]() -> int32_t {
    Weight w;
    w.k = parts[0].k;
    if (extend(c, w, parts, n) < 0) return -1;
    c->weights.push_back(std::move(w));
    return (int32_t)c->weights.size() - 1;
  });
}

int32_t pg_extend(pg_context* c, int32_t weight, const pg_part* parts, int32_t n) {
  return guarded(c, [&]() -> int32_t { return extend(c, c->weights[weight], parts, n); });
}

int32_t pg_vector(pg_context* c, const float* data, int64_t n) {
  return guarded(c, [&]() -> int32_t {
    std::vector<float> v(data, data + n);
    v.resize(n + kPanel);  // read in whole vectors
    c->vectors.push_back(std::move(v));
    return (int32_t)c->vectors.size() - 1;
  });
}

int32_t pg_order(pg_context* c, const int32_t* places, int64_t n) {
  return guarded(c, [&]() -> int32_t {
    c->orders.emplace_back(places, places + n);
    return (int32_t)c->orders.size();
  });
}

int64_t pg_weight_bytes(pg_context* c) {
  int64_t total = c->arena.used();
  for (auto& v : c->vectors) total += (int64_t)v.size() * 4;
  return total;
}

int32_t pg_program(pg_context* c, const pg_dims* d, const pg_buffer* buffers, int32_t n_buffers, const pg_op* ops, int32_t n_ops) {
  return guarded(c, [&]() -> int32_t {
    c->dims = *d;
    c->inv_freq.assign(d->inv_freq, d->inv_freq + d->rope_dim / 2);
    const int local_dim = d->local.head_dim ? d->local.rope_dim : d->rope_dim;
    c->rope_axes.assign(std::max(d->rope_dim, local_dim) / 2, 0);
    if (d->rope_axes) std::copy(d->rope_axes, d->rope_axes + d->rope_dim / 2, c->rope_axes.begin());
    if (d->local_inv_freq) c->local_inv_freq.assign(d->local_inv_freq, d->local_inv_freq + local_dim / 2);
    const int64_t turned = d->rope_dim + (d->local_inv_freq ? local_dim : 0);
    c->ops.assign(ops, ops + n_ops);
    c->buffers.clear(), c->buffers.resize(n_buffers);
    mark_producers(*c);
    for (int i = 0; i < n_buffers; i++) c->buffers[i] = make_buffer(buffers[i], *d, reads_of(*c, i));
    make_caches(*c);
    c->writers.assign(d->num_blocks, -1);
    const pg_delta& n = d->delta;
    c->state_pages = Pages(layer_state(n) * n.layers * n.slots * 4);
    c->rope_pages = Pages(turned * d->max_tokens * 4);
    const bool head = std::any_of(c->ops.begin(), c->ops.end(), [](const pg_op& op) { return op.kind == PG_HEAD; });
    c->logit_pages = head ? Pages((int64_t)d->max_rows * d->vocab * 4) : Pages();
    const int head_dim = std::max(d->head_dim, d->local.head_dim);
    int64_t widest = std::max(attention_scratch(head_dim), encoder_scratch(head_dim));
    widest = std::max(widest, delta_scratch(n.key_dim, n.value_dim));
    int64_t row = 0;
    for (auto& b : c->buffers) row = std::max(row, b.width);
    widest = std::max(widest, row);
    for (auto& op : c->ops)
      if (op.kind == PG_ABSORB || op.kind == PG_EXPAND) widest = std::max(widest, heads_scratch(c->weights[op.weight].k));
      else if (op.kind == PG_EXPERTS_UP || op.kind == PG_EXPERTS_DOWN) widest = std::max(widest, experts_scratch(c->weights[op.weight]));
    for (auto& s : c->row_scratch) s.resize(widest);
    for (auto& s : c->row_values) s.resize(row + kPanel);
    return 0;
  });
}

void pg_release(pg_context* c) {
  for (auto& b : c->buffers)
    for (const Pages* p : {&b.f, &b.q, &b.d, &b.s, &b.n, &b.h, &b.wide, &b.bf16}) p->release();
  c->rope_pages.release();
}

int32_t pg_adapt(pg_context* c, int32_t place, const pg_low_rank* pairs, int32_t n) {
  return guarded(c, [&]() -> int32_t {
    pg_wait(c);
    Adapter made;
    if (place < 0 || !make_adapter(*c, pairs, n, made)) {
      c->error = "an adapter that does not fit the model";
      return -1;
    }
    if (place >= (int32_t)c->adapters.size()) c->adapters.resize(place + 1);
    c->adapters[place] = std::move(made);
    return 0;
  });
}

int32_t pg_touch(pg_context* c, int64_t ahead_bytes) {
  const int64_t end = std::min(c->kv_used + ahead_bytes, c->kv_pages.bytes());
  c->kv_touched = std::max(c->kv_touched, c->kv_used / kHuge * kHuge);
  if (c->kv_touched >= end) return 0;
  const int64_t to = std::min(c->kv_touched + kHuge, c->kv_pages.bytes());
  const bool done = c->kv_pages.touch(c->kv_touched, to);
  c->kv_touched = done ? to : c->kv_pages.bytes();  // a system that cannot is not asked again
  return done;
}

int64_t pg_activation_bytes(pg_context* c) {
  int64_t total = c->rope_pages.bytes() + c->logit_pages.bytes();
  for (auto& b : c->buffers) total += b.f.bytes() + b.q.bytes() + b.d.bytes() + b.s.bytes() + b.n.bytes() + b.h.bytes() + b.wide.bytes() + b.bf16.bytes();
  return total;
}
}
