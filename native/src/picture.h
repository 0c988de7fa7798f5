// What a step takes from a picture: the pixels of its patches, and where these lie.
#pragma once
#include <algorithm>

#include "context.h"

namespace pagoda {

// The pixels of a patch, normalized: channel, frame, row, column; and zeros behind them. A row that is no patch has zeros.
inline void take_patch(const pg_step& st, int64_t token, float* out, int64_t width) {
  const pg_picture& p = *st.picture;
  const int32_t* at = st.rope_positions + token;
  const int64_t group = at[0], top = at[st.tokens_count] * p.patch_size, left = at[2 * (int64_t)st.tokens_count] * p.patch_size;
  float* const end = out + width;
  if (top < 0) return (void)std::fill(out, end, 0.0f);
  for (int channel = 0; channel < 3; channel++)
    for (int64_t f = group * p.together; f < (group + 1) * p.together; f++)
      for (int64_t y = top; y < top + p.patch_size; y++) {
        const uint8_t* from = p.pixels + ((std::min<int64_t>(f, p.frames - 1) * p.height + y) * p.width + left) * 3 + channel;
        for (int x = 0; x < p.patch_size; x++) *out++ = (from[3 * x] - p.mean[channel]) / p.spread[channel];
      }
  std::fill(out, end, 0.0f);
}

// The position of a patch, which lies between two rows and two columns of a square table. What stands behind the table
// is what the row that is no patch begins with.
inline void add_grid_position(const pg_step& st, int64_t token, const float* table, int64_t side, int64_t width, float* out) {
  const pg_picture& p = *st.picture;
  if (st.rope_positions[(int64_t)st.tokens_count + token] < 0) return (void)std::copy_n(table + side * side * width, width, out);
  const int sizes[2] = {p.height / p.patch_size, p.width / p.patch_size};
  int64_t low[2], high[2];
  float share[2];
  for (int axis = 0; axis < 2; axis++) {
    const float at = st.rope_positions[(int64_t)(axis + 1) * st.tokens_count + token];
    const float where = at * (float)(side - 1) / (float)std::max(sizes[axis] - 1, 1);
    low[axis] = std::min<int64_t>((int64_t)where, side - 1), high[axis] = std::min(low[axis] + 1, side - 1);
    share[axis] = where - (float)low[axis];
  }
  const float down = share[0], right = share[1];
  const auto row = [&](int64_t y, int64_t x) { return table + (y * side + x) * width; };
  const float *a = row(low[0], low[1]), *b = row(low[0], high[1]), *c = row(high[0], low[1]), *d = row(high[0], high[1]);
  const float wa = (1 - down) * (1 - right), wb = (1 - down) * right, wc = down * (1 - right), wd = down * right;
  for (int64_t i = 0; i < width; i++) out[i] += wa * a[i] + wb * b[i] + wc * c[i] + wd * d[i];
}

// Whether its patches lie within a picture; one that lies before the first row and column is no patch.
inline bool holds_patches(const pg_step& st) {
  const pg_picture& p = *st.picture;
  const int64_t most[3] = {ceil_div(p.frames, p.together), p.height / p.patch_size, p.width / p.patch_size};
  for (int axis = 0; axis < 3; axis++)
    for (int64_t t = axis * (int64_t)st.tokens_count; t < (axis + 1) * (int64_t)st.tokens_count; t++)
      if (st.rope_positions[t] < (axis ? -1 : 0) || st.rope_positions[t] >= most[axis]) return false;
  for (int64_t t = st.tokens_count; t < 2 * (int64_t)st.tokens_count; t++)
    if ((st.rope_positions[t] < 0) != (st.rope_positions[t + st.tokens_count] < 0)) return false;
  return true;
}

}  // namespace pagoda
