// Whether a step fits the model: what it says is looked at before anything is computed.
#pragma once
#include "adapt.h"
#include "delta_step.h"
#include "picture.h"

namespace pagoda {

inline bool valid(const pg_context& c, const pg_step& st) {
  if (st.tokens_count < 1 || st.tokens_count > c.dims.max_tokens || st.starts[st.requests] != st.tokens_count) return false;
  for (int t = 0; t < st.tokens_count; t++)
    if (st.tokens[t] < 0 || st.tokens[t] >= c.dims.vocab) return false;
  if (st.picture && !holds_patches(st)) return false;
  for (int l = 0; l < st.rows_count; l++)
    if (st.rows[l] < 0 || st.rows[l] >= st.tokens_count) return false;
  if (!has_slots(c, st) || !has_adapters(c, st)) return false;
  for (int r = 0; r < st.requests && c.dims.num_blocks > 0; r++) {
    const int last_position = st.positions[r] + st.starts[r + 1] - st.starts[r] - 1, last = last_position / kTokens;
    if (last >= st.table_width) return false;
    for (int t = st.starts[r]; st.last_seen && t < st.starts[r + 1]; t++)
      if (st.last_seen[t] < st.positions[r] + t - st.starts[r] || st.last_seen[t] > last_position) return false;
    for (int b = 0; b <= last; b++) {
      const int block = st.block_tables[(int64_t)st.slots[r] * st.table_width + b];
      if (block < 0 || block >= c.dims.num_blocks) return false;
    }
  }
  return true;
}

}  // namespace pagoda
