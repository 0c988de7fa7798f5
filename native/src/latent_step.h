// Latent attention: the products of each head by itself, and what a token keeps.
#pragma once
#include "experts.h"

namespace pagoda {

constexpr int64_t kHeadRows = 32;  // tokens of a chunk, for one head

// Floats of scratch for the rows of a chunk: as floats, and as codes with what belongs to them.
constexpr int64_t heads_scratch(int64_t k) { return 2 * kHeadRows * k; }

// k values from `column` on of n rows, one behind the other in `to`, as the weight reads them.
inline Rows head_rows(const pg_context& c, const Buffer& from, int64_t row, int64_t n, int64_t column, const Part& part, int64_t k, float* to) {
  const int64_t blocks = k / kBlock;
  const Form form = form_of(*c.kernels, part.type, k);
  uint16_t* bf16 = form == Form::bf16 ? (uint16_t*)(to + kHeadRows * k) : nullptr;
  int8_t* q = (int8_t*)(to + kHeadRows * k);
  float *d = (float*)(q + kHeadRows * k), *s = d + kHeadRows * blocks;
  int32_t *sums = (int32_t*)(s + kHeadRows * blocks), *h = sums + kHeadRows * blocks;
  int16_t* wide = c.kernels->wide ? (int16_t*)(h + 2 * kHeadRows * blocks) : nullptr;
  for (int64_t i = 0; i < n; i++) {
    memcpy(to + i * k, from.row(row + i) + column, k * sizeof(float));
    if (bf16) c.kernels->to_bf16(to + i * k, k, bf16 + i * k);
    if (form != Form::codes) continue;
    c.kernels->quantize(to + i * k, k, {q + i * k, d + i * blocks, s + i * blocks, sums + i * blocks, h + 2 * i * blocks, wide ? wide + i * k : nullptr, nullptr});
  }
  return {to, q, d, s, sums, h, wide, bf16, k};
}

// PG_ABSORB and PG_EXPAND: a chunk is one head of some of the `rows` tokens from `row` on.
inline void head_products(pg_context& c, const pg_op& op, int64_t row, int64_t rows, int64_t chunk, float* scratch) {
  const pg_dims& d = c.dims;
  const Weight& w = c.weights[op.weight];
  const Buffer &in = c.buffers[op.in], &out = c.buffers[op.out];
  const int64_t head = chunk % d.heads, first = chunk / d.heads * kHeadRows, n = std::min(kHeadRows, rows - first);
  const Part& part = w.parts[head];
  const bool absorbs = op.kind == PG_ABSORB;
  const int64_t turned = absorbs ? c.heads.kv.turned : 0, in_at = head * (w.k + turned), out_at = head * (part.rows + turned);
  row += first;
  for (int64_t i = 0; i < n; i++) memcpy(out.row(row + i) + out_at, in.row(row + i) + in_at + w.k, turned * sizeof(float));
  const Rows a = head_rows(c, in, row, n, in_at, part, w.k, scratch);
  c.kernels->matmul(part, 0, panels_of(part.rows), a, 0, n, {out.row(row) + out_at + turned - part.first_row, out.width, nullptr, false});
}

// PG_LATENT_KEY
inline void latent_key(const pg_context& c, const pg_op& op, const float* in, float* out) {
  const int64_t rank = c.dims.latent.rank, turned = c.heads.kv.turned;
  in += op.layer, out += (int64_t)c.dims.heads * c.dims.head_dim;
  memcpy(out, in + rank, turned * sizeof(float));
  c.kernels->norm(in, c.vectors[op.vector].data(), rank, op.f, out + turned);
}

}  // namespace pagoda
