// The gated delta nets of a step: which tokens, heads and states a chunk is of.
#pragma once
#include "context.h"

namespace pagoda {

inline bool has_slots(const pg_context& c, const pg_step& st) {
  for (int r = 0; r < st.requests && c.dims.delta.layers > 0; r++)
    if (st.slots[r] < 0 || st.slots[r] >= c.dims.delta.slots) return false;
  return true;
}

// A chunk is all tokens of a request, for one key head.
inline void run_delta(pg_context& c, const pg_step& st, const pg_op& op, int64_t chunk, float* scratch) {
  const pg_delta& d = c.dims.delta;
  const int r = (int)(chunk / d.key_heads), head = (int)(chunk % d.key_heads);
  const Buffer &in = c.buffers[op.in], &out = c.buffers[op.out];
  const int64_t row = st.starts[r], width = 2 * (int64_t)d.key_heads * d.key_dim + (int64_t)d.value_heads * d.value_dim;
  const int64_t place = ((int64_t)st.slots[r] * d.layers + op.layer) * d.key_heads + head;
  const int64_t size = delta_state(d.key_dim, d.value_dim, d.value_heads / d.key_heads, d.kernel);
  const float* heads = c.vectors[op.vector2].data();
  c.kernels->delta({in.row(row), in.width, out.row(row), out.width, (int)(st.starts[r + 1] - row),
                    head, d.key_heads, d.value_heads, d.key_dim, d.value_dim, d.kernel, d.tiled != 0, st.positions[r] == 0,
                    c.vectors[op.vector].data(), width, heads, heads + d.value_heads, heads + 2 * d.value_heads, op.f,
                    reinterpret_cast<float*>(c.state_pages.data()) + place * size}, scratch);
}

}  // namespace pagoda
