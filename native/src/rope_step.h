// What stands between the product of q, k and v and attention: norms, rotation, the cache.
#pragma once
#include <cmath>

#include "context.h"
#include "rows.h"

namespace pagoda {

// Norms and rotation of one token's heads; its keys and values go to the cache. `cos`: its row of the table of angles;
// `blocks`: of its request.
inline void turn_heads(const pg_context& c, const pg_op& op, float* row, const float* cos, int position, const int32_t* blocks) {
  const pg_dims& d = c.dims;
  const Heads& own = c.heads_of(op);
  const KvCache& kv = own.kv;
  const auto vector = [&](int32_t id) -> const float* { return id >= 0 ? c.vectors[id].data() : nullptr; };
  const int dim = kv.head_dim, kv_heads = op.flags & PG_QUERIES ? 0 : kv.heads;
  const bool whole = op.flags & PG_WHOLE;
  for (int h = 0; h < d.heads + kv_heads; h++) {
    const float* weight = vector(h < d.heads ? op.vector : op.vector2);
    const int together = !whole ? 1 : h == 0 ? d.heads : h == d.heads ? kv_heads : 0;
    float* head = row + h * dim;
    const auto norm = [&] { if (weight && together) c.kernels->norm(head, weight, together * dim, op.f, head); };
    if (!(op.flags & PG_LATE)) norm();
    if (!(op.flags & PG_STILL)) c.kernels->rotate(head, cos, cos + own.rope_dim / 2, own.rope_dim, d.rope_interleaved != 0);
    if (op.flags & PG_LATE) norm();
  }
  if (d.query_beta > 0.0f) {
    const float scale = (float)(1.0 + d.query_beta * std::log1p((double)(position / d.query_length)));
    for (int64_t i = 0; i < d.heads * dim; i++) row[i] *= scale;
  }
  if (!kv.data || !kv_heads) return;
  float *k = row + d.heads * dim, *v = k + kv_heads * dim;
  for (int h = 0; h < kv_heads; h++) {
    if (op.flags & PG_NORM_VALUES) norm_plainly(v + h * dim, dim, op.f);
    c.kernels->store_kv(kv, op.layer, blocks[position / kTokens], h, position % kTokens, k + h * dim, v + h * dim);
  }
}

}  // namespace pagoda
