// The layers with a state of a step: which tokens, heads and states a chunk is of.
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

// Floats that a layer keeps of a request.
inline int64_t layer_state(const pg_delta& d) {
  if (!d.layers) return 0;
  if (!d.parts) return d.key_heads * delta_state(d.key_dim, d.value_dim, d.value_heads / d.key_heads, d.kernel);
  return d.parts * conv_state(d.channels() / d.parts, d.kernel) + (int64_t)d.value_heads * d.key_dim * d.value_dim;
}

// advance(from, to, state) of all tokens of request r, with the `size` floats from `at` on of what the layer `op.layer` keeps
// of it; the state that it begins with is put there before, and the one that is to be kept is copied on the way.
template <typename Advance>
void walk(pg_context& c, const pg_step& st, const pg_op& op, int r, int64_t at, int64_t size, Advance advance) {
  const auto state_of = [&](int64_t slot) {
    return reinterpret_cast<float*>(c.state_pages.data()) + (slot * c.dims.delta.layers + op.layer) * layer_state(c.dims.delta) + at;
  };
  const int64_t row = st.starts[r], end = st.starts[r + 1];
  float* state = state_of(st.slots[r]);
  const int32_t nothing[] = {-1, -1, -1}, *kept = st.kept ? st.kept + 3 * r : nothing;
  if (kept[0] >= 0) memcpy(state, state_of(kept[0]), size * sizeof(float));
  else if (st.positions[r] == 0) memset(state, 0, size * sizeof(float));
  const int64_t copied = kept[1] < 0 ? row : row + kept[2] - st.positions[r];
  if (row < copied) advance(row, copied, state);
  if (kept[1] >= 0) memcpy(state_of(kept[1]), state, size * sizeof(float));
  if (copied < end) advance(copied, end, state);
}

// A chunk is all tokens of a request, for one key head.
inline void run_delta(pg_context& c, const pg_step& st, const pg_op& op, int64_t chunk, float* scratch) {
  const pg_delta& d = c.dims.delta;
  const int r = (int)(chunk / d.key_heads), head = (int)(chunk % d.key_heads);
  const Buffer &in = c.buffers[op.in], &out = c.buffers[op.out];
  const int64_t width = d.channels();
  const int64_t size = delta_state(d.key_dim, d.value_dim, d.value_heads / d.key_heads, d.kernel);
  const float* heads = c.vectors[op.vector2].data();
  walk(c, st, op, r, head * size, size, [&](int64_t from, int64_t to, float* state) {
    if (!d.key_dim) {
      const int64_t at = (int64_t)head * d.value_dim;
      return short_conv(in.row(from) + at, in.width, out.row(from) + at, out.width, to - from, d.value_dim, width,
                        c.vectors[op.vector].data() + at, d.kernel, state);
    }
    c.kernels->delta({in.row(from), in.width, out.row(from), out.width, (int)(to - from),
                      head, d.key_heads, d.value_heads, d.key_dim, d.value_dim, d.kernel, d.tiled != 0,
                      c.vectors[op.vector].data(), width, heads, heads + d.value_heads, heads + 2 * d.value_heads, op.f,
                      state}, scratch);
  });
}

// A chunk is all tokens of a request, for one part of the channels.
inline void run_convolve(pg_context& c, const pg_step& st, const pg_op& op, int64_t chunk) {
  const pg_delta& d = c.dims.delta;
  const int r = (int)(chunk / d.parts), part = (int)(chunk % d.parts);
  const int64_t n = d.channels() / d.parts, size = conv_state(n, d.kernel), at = part * n;
  const Buffer& in = c.buffers[op.in];
  const float* taps = c.vectors[op.vector].data();
  walk(c, st, op, r, part * size, size, [&](int64_t from, int64_t to, float* state) {
    float* x = in.row(from) + at;
    c.kernels->convolve({x, in.width, x, in.width, (int)(to - from), (int)n, d.kernel, taps + at, taps + d.kernel * d.channels() + at,
                         d.channels(), state, n});
  });
}

// A chunk is all tokens of a request, for one head.
inline void run_scan(pg_context& c, const pg_step& st, const pg_op& op, int64_t chunk) {
  const pg_delta& d = c.dims.delta;
  const int r = (int)(chunk / d.value_heads), head = (int)(chunk % d.value_heads);
  const int64_t size = (int64_t)d.key_dim * d.value_dim, own = head / (d.value_heads / d.key_heads) * d.key_dim;
  const int64_t keys = (int64_t)d.key_heads * d.key_dim, values = (int64_t)d.value_heads * d.value_dim, at = head * d.value_dim;
  const int64_t behind = d.parts * conv_state(d.channels() / d.parts, d.kernel);
  const Buffer &in = c.buffers[op.in], &out = c.buffers[op.out];
  const float* heads = c.vectors[op.vector].data() + head;
  walk(c, st, op, r, behind + head * size, size, [&](int64_t from, int64_t to, float* state) {
    const float *q = in.row(from), *k = q + keys, *v = k + keys;
    c.kernels->scan({q + own, k + own, v + at, v + 2 * values + head, in.width, out.row(from) + at, out.width, (int)(to - from),
                     d.key_dim, d.value_dim, heads[0], heads[d.value_heads], heads[2 * d.value_heads], state});
  });
}

inline void run_with_state(pg_context& c, const pg_step& st, const pg_op& op, int64_t chunk, float* scratch) {
  if (op.kind == PG_CONVOLVE) return run_convolve(c, st, op, chunk);
  if (op.kind == PG_SCAN) return run_scan(c, st, op, chunk);
  run_delta(c, st, op, chunk, scratch);
}

// One row.
inline void norm_gated(pg_context& c, const pg_op& op, const float* in, float* out) {
  const int64_t n = c.buffers[op.out].width / op.window;
  const float* weight = c.vectors[op.vector].data();
  for (int64_t i = 0; i < op.window; i++) c.kernels->norm_gated(in + op.layer + i * n, weight + i * n, n, op.f, out + i * n);
}

}  // namespace pagoda
