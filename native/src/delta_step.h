// The gated delta nets and the short convolutions of a step: which tokens, heads and states a chunk is of.
#pragma once
#include <cstring>

#include "context.h"
#include "short_conv.h"

namespace pagoda {

inline bool has_slots(const pg_context& c, const pg_step& st) {
  for (int r = 0; r < st.requests && c.dims.delta.layers > 0; r++)
    if (st.slots[r] < 0 || st.slots[r] >= c.dims.delta.slots) return false;
  for (int r = 0; r < st.requests && st.kept; r++) {
    const int32_t *kept = st.kept + 3 * r, tokens = st.starts[r + 1] - st.starts[r];
    if (kept[0] >= c.dims.delta.slots || kept[1] >= c.dims.delta.slots) return false;
    if (kept[1] >= 0 && (kept[2] <= st.positions[r] || kept[2] > st.positions[r] + tokens)) return false;
  }
  return true;
}

// A chunk is all tokens of a request, for one key head.
inline void run_delta(pg_context& c, const pg_step& st, const pg_op& op, int64_t chunk, float* scratch) {
  const pg_delta& d = c.dims.delta;
  const int r = (int)(chunk / d.key_heads), head = (int)(chunk % d.key_heads);
  const Buffer &in = c.buffers[op.in], &out = c.buffers[op.out];
  const int64_t row = st.starts[r], width = 2 * (int64_t)d.key_heads * d.key_dim + (int64_t)d.value_heads * d.value_dim;
  const int64_t size = delta_state(d.key_dim, d.value_dim, d.value_heads / d.key_heads, d.kernel);
  const float* heads = c.vectors[op.vector2].data();
  const auto state_of = [&](int64_t slot) {
    return reinterpret_cast<float*>(c.state_pages.data()) + ((slot * d.layers + op.layer) * d.key_heads + head) * size;
  };
  float* state = state_of(st.slots[r]);
  const auto advance = [&](int64_t from, int64_t to) {
    if (from == to) return;
    if (!d.key_dim) {
      const int64_t at = (int64_t)head * d.value_dim;
      return short_conv(in.row(from) + at, in.width, out.row(from) + at, out.width, to - from, d.value_dim, width,
                        c.vectors[op.vector].data() + at, d.kernel, state);
    }
    c.kernels->delta({in.row(from), in.width, out.row(from), out.width, (int)(to - from),
                      head, d.key_heads, d.value_heads, d.key_dim, d.value_dim, d.kernel, d.tiled != 0,
                      c.vectors[op.vector].data(), width, heads, heads + d.value_heads, heads + 2 * d.value_heads, op.f,
                      state}, scratch);
  };
  const int32_t nothing[] = {-1, -1, -1}, *kept = st.kept ? st.kept + 3 * r : nothing;
  if (kept[0] >= 0) memcpy(state, state_of(kept[0]), size * sizeof(float));
  else if (st.positions[r] == 0) memset(state, 0, size * sizeof(float));
  const int64_t copied = kept[1] < 0 ? row : row + kept[2] - st.positions[r];
  advance(row, copied);
  if (kept[1] >= 0) memcpy(state_of(kept[1]), state, size * sizeof(float));
  advance(copied, st.starts[r + 1]);
}

}  // namespace pagoda
