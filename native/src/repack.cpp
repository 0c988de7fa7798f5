// From the blocks of GGUF (and plain float rows) to panels. One decoder per type says what the codes and scales of a
// 32-deep block are; everything else is common.
#include <cstring>

#include "layout.h"
#include "quantize.h"

namespace pagoda {
namespace {

struct Codes {
  uint8_t q[kBlock];
};

// Where the 256-deep group of block b starts, and which eighth of it b is.
template <int Bytes> const uint8_t* group(const uint8_t* row, int64_t b) { return row + b / 8 * Bytes; }

void nibbles(const uint8_t* q, Codes& c) {
  for (int i = 0; i < 16; i++) c.q[i] = q[i] & 15, c.q[i + 16] = q[i] >> 4;
}

// The six-bit scale and minimum number i of Q4_K and Q5_K, packed into 12 bytes.
void scale_min(const uint8_t* s, int i, uint8_t& scale, uint8_t& minimum) {
  if (i < 4) {
    scale = s[i] & 63, minimum = s[i + 4] & 63;
  } else {
    scale = (s[i + 4] & 15) | (s[i - 4] >> 6) << 4;
    minimum = (s[i + 4] >> 4) | (s[i] >> 6) << 4;
  }
}

// Each decoder: codes of block b of a row, `tail` = the bytes this row puts behind the planes (one byte or one f16 for
// each field, in order), `head` = the f16 fields in front of each 8 blocks.
template <int Type> struct Decode;

template <> struct Decode<PG_Q4_0> {
  static constexpr int row_bytes = 18, tail_fields = 1, tail_width = 2, head_fields = 0;
  static void block(const uint8_t* row, int64_t b, Codes& c, uint8_t* tail, uint8_t*) {
    const uint8_t* p = row + b * 18;
    memcpy(tail, p, 2), nibbles(p + 2, c);
  }
};
template <> struct Decode<PG_Q4_1> {
  static constexpr int row_bytes = 20, tail_fields = 2, tail_width = 2, head_fields = 0;
  static void block(const uint8_t* row, int64_t b, Codes& c, uint8_t* tail, uint8_t*) {
    const uint8_t* p = row + b * 20;
    memcpy(tail, p, 4), nibbles(p + 4, c);
  }
};
void fifth_bits(const uint8_t* high, Codes& c) {
  for (int i = 0; i < 32; i++) c.q[i] |= (high[i / 8] >> i % 8 & 1) << 4;
}
template <> struct Decode<PG_Q5_0> {
  static constexpr int row_bytes = 22, tail_fields = 1, tail_width = 2, head_fields = 0;
  static void block(const uint8_t* row, int64_t b, Codes& c, uint8_t* tail, uint8_t*) {
    const uint8_t* p = row + b * 22;
    memcpy(tail, p, 2), nibbles(p + 6, c), fifth_bits(p + 2, c);
  }
};
template <> struct Decode<PG_Q5_1> {
  static constexpr int row_bytes = 24, tail_fields = 2, tail_width = 2, head_fields = 0;
  static void block(const uint8_t* row, int64_t b, Codes& c, uint8_t* tail, uint8_t*) {
    const uint8_t* p = row + b * 24;
    memcpy(tail, p, 4), nibbles(p + 8, c), fifth_bits(p + 4, c);
  }
};
template <> struct Decode<PG_Q8_0> {
  static constexpr int row_bytes = 34, tail_fields = 1, tail_width = 2, head_fields = 0;
  static void block(const uint8_t* row, int64_t b, Codes& c, uint8_t* tail, uint8_t*) {
    const uint8_t* p = row + b * 34;
    memcpy(tail, p, 2), memcpy(c.q, p + 2, 32);
  }
};
template <> struct Decode<PG_Q4_K> {
  static constexpr int row_bytes = 144, tail_fields = 2, tail_width = 1, head_fields = 2;
  static void block(const uint8_t* row, int64_t b, Codes& c, uint8_t* tail, uint8_t* head) {
    const uint8_t* p = group<144>(row, b);
    int i = b % 8;
    memcpy(head, p, 4), scale_min(p + 4, i, tail[0], tail[1]);
    const uint8_t* q = p + 16 + i / 2 * 32;
    for (int j = 0; j < 32; j++) c.q[j] = i & 1 ? q[j] >> 4 : q[j] & 15;
  }
};
template <> struct Decode<PG_Q5_K> {
  static constexpr int row_bytes = 176, tail_fields = 2, tail_width = 1, head_fields = 2;
  static void block(const uint8_t* row, int64_t b, Codes& c, uint8_t* tail, uint8_t* head) {
    const uint8_t* p = group<176>(row, b);
    int i = b % 8;
    memcpy(head, p, 4), scale_min(p + 4, i, tail[0], tail[1]);
    const uint8_t *high = p + 16, *q = p + 48 + i / 2 * 32;
    for (int j = 0; j < 32; j++) c.q[j] = (i & 1 ? q[j] >> 4 : q[j] & 15) | (high[j] >> i & 1) << 4;
  }
};
template <> struct Decode<PG_Q6_K> {
  static constexpr int row_bytes = 210, tail_fields = 2, tail_width = 1, head_fields = 1;
  static void block(const uint8_t* row, int64_t b, Codes& c, uint8_t* tail, uint8_t* head) {
    const uint8_t* p = group<210>(row, b);
    int i = b % 8, half = i / 4, quarter = i % 4;  // 128 values per half, 32 per quarter
    memcpy(head, p + 208, 2), memcpy(tail, p + 192 + 2 * i, 2);
    const uint8_t *low = p + half * 64 + (quarter & 1) * 32, *high = p + 128 + half * 32;
    for (int j = 0; j < 32; j++)
      c.q[j] = (quarter < 2 ? low[j] & 15 : low[j] >> 4) | (high[j] >> 2 * quarter & 3) << 4;
  }
};
template <> struct Decode<PG_Q2_K> {
  static constexpr int row_bytes = 84, tail_fields = 4, tail_width = 1, head_fields = 2;
  static void block(const uint8_t* row, int64_t b, Codes& c, uint8_t* tail, uint8_t* head) {
    const uint8_t* p = group<84>(row, b);
    int i = b % 8;
    memcpy(head, p + 80, 4);
    for (int g = 0; g < 2; g++) tail[g] = p[2 * i + g] & 15, tail[2 + g] = p[2 * i + g] >> 4;
    for (int j = 0; j < 32; j++) c.q[j] = p[16 + i / 4 * 32 + j] >> 2 * (i % 4) & 3;
  }
};
template <> struct Decode<PG_Q3_K> {
  static constexpr int row_bytes = 110, tail_fields = 2, tail_width = 1, head_fields = 1;
  static void block(const uint8_t* row, int64_t b, Codes& c, uint8_t* tail, uint8_t* head) {
    const uint8_t* p = group<110>(row, b);
    int i = b % 8;
    memcpy(head, p + 108, 2);
    for (int g = 0; g < 2; g++) {
      int n = 2 * i + g;
      const uint8_t* s = p + 96;
      int low = n < 8 ? s[n] & 15 : s[n - 8] >> 4, high = s[8 + n % 4] >> 2 * (n / 4) & 3;
      tail[g] = (uint8_t)(int8_t)((low | high << 4) - 32);
    }
    for (int j = 0; j < 32; j++)
      c.q[j] = (p[32 + i / 4 * 32 + j] >> 2 * (i % 4) & 3) | (p[j] >> i & 1) << 2;
  }
};
template <> struct Decode<PG_IQ4_NL> : Decode<PG_Q4_0> {};
template <> struct Decode<PG_MXFP4> {
  static constexpr int row_bytes = 17, tail_fields = 1, tail_width = 1, head_fields = 0;
  static void block(const uint8_t* row, int64_t b, Codes& c, uint8_t* tail, uint8_t*) {
    const uint8_t* p = row + b * 17;
    tail[0] = p[0] ? p[0] - 1 : 0;  // half the scale, as the table has its numbers times two
    nibbles(p + 1, c);
  }
};
template <> struct Decode<PG_IQ4_XS> {
  static constexpr int row_bytes = 136, tail_fields = 1, tail_width = 1, head_fields = 1;
  static void block(const uint8_t* row, int64_t b, Codes& c, uint8_t* tail, uint8_t* head) {
    const uint8_t* p = group<136>(row, b);
    int i = b % 8;
    int low = p[4 + i / 2] >> 4 * (i % 2) & 15, high = p[2 + i / 4] >> 2 * (i % 4) & 3;
    memcpy(head, p, 2), tail[0] = (uint8_t)(int8_t)((low | high << 4) - 32);
    nibbles(p + 8 + 16 * i, c);
  }
};
template <> struct Decode<PG_U4G> {
  static constexpr int row_bytes = 19, tail_fields = 2, tail_width = 2, head_fields = 0;
  static void block(const uint8_t* row, int64_t b, Codes& c, uint8_t* tail, uint8_t*) {
    const uint8_t* p = row + b * 19;
    memcpy(tail, p, 3), nibbles(p + 3, c);
  }
};
template <> struct Decode<PG_U8G> {
  static constexpr int row_bytes = 35, tail_fields = 2, tail_width = 2, head_fields = 0;
  static void block(const uint8_t* row, int64_t b, Codes& c, uint8_t* tail, uint8_t*) {
    const uint8_t* p = row + b * 35;
    memcpy(tail, p, 3);
    for (int i = 0; i < 32; i++) c.q[i] = p[3 + i] ^ 128;
  }
};

// A float type on its way to Q8_0, Q5_1 or Q4_1.
template <int Type, int To> struct Quantize {
  static constexpr int row_bytes = kBlock * float_bytes(Type), tail_fields = To == PG_Q8_0 ? 1 : 2, tail_width = 2, head_fields = 0;
  static void block(const uint8_t* row, int64_t b, Codes& c, uint8_t* tail, uint8_t*) {
    const quantize::Floats x = quantize::block_of<Type>(row + b * row_bytes);
    To == PG_Q8_0 ? quantize::to_q8_0(x, c.q, tail) : quantize::to_line(x, To == PG_Q5_1 ? 31.0f : 15.0f, c.q, tail);
  }
};

// Bit planes of the 8 vectors of codes, by type: see layout.h.
void put_nibbles(const uint8_t (*v)[32], uint8_t* to) {
  for (int i = 0; i < 4; i++)
    for (int j = 0; j < 32; j++) to[32 * i + j] = (v[2 * i][j] & 15) | (v[2 * i + 1][j] & 15) << 4;
}
void put_crumbs(const uint8_t (*v)[32], int shift, uint8_t* to) {
  for (int i = 0; i < 2; i++)
    for (int j = 0; j < 32; j++) {
      int byte = 0;
      for (int n = 0; n < 4; n++) byte |= (v[4 * i + n][j] >> shift & 3) << 2 * n;
      to[32 * i + j] = byte;
    }
}
void put_bits(const uint8_t (*v)[32], int shift, uint8_t* to) {
  for (int j = 0; j < 32; j++) {
    int byte = 0;
    for (int n = 0; n < 8; n++) byte |= (v[n][j] >> shift & 1) << n;
    to[j] = byte;
  }
}

template <int Type> int put_planes(const uint8_t (*v)[32], uint8_t* to) {
  switch (Type) {
    case PG_Q8_0: case PG_U8G: memcpy(to, v, 256); return 256;
    case PG_Q2_K: put_crumbs(v, 0, to); return 64;
    case PG_Q3_K: put_crumbs(v, 0, to), put_bits(v, 2, to + 64); return 96;
    case PG_Q5_0: case PG_Q5_1: case PG_Q5_K: put_nibbles(v, to), put_bits(v, 4, to + 128); return 160;
    case PG_Q6_K: put_nibbles(v, to), put_crumbs(v, 4, to + 128); return 192;
    default: put_nibbles(v, to); return 128;
  }
}

// `to`: the pair of panels that this one belongs to.
template <int Type, typename D = Decode<Type>> void repack_panel(const pg_part& from, int64_t panel, uint8_t* to) {
  constexpr Layout layout = layout_of(Type);
  constexpr int depth = layout.header ? 256 : 32;
  const int64_t row_bytes = from.k / depth * D::row_bytes, second = panel % 2;
  alignas(32) uint8_t vectors[8][32];
  for (int64_t b = 0; b < from.k / kBlock; b++, to += 2 * layout.block) {
    uint8_t tails[kPanel][8] = {}, heads[kPanel][4] = {};
    memset(vectors, 0, sizeof vectors);
    for (int r = 0; r < kPanel && panel * kPanel + r < from.rows; r++) {
      Codes c;
      D::block(from.data + (panel * kPanel + r) * row_bytes, b, c, tails[r], heads[r]);
      for (int v = 0; v < 8; v++) memcpy(&vectors[v][4 * r], c.q + 4 * v, 4);
    }
    if (layout.header && b % kSuper == 0) {
      uint8_t* at = to + second * layout.header;
      for (int f = 0; f < D::head_fields; f++, at += 16)
        for (int r = 0; r < kPanel; r++) memcpy(at + 2 * r, heads[r] + 2 * f, 2);
      to += 2 * layout.header;
    }
    uint8_t* at = to + second * layout.block;
    at += put_planes<Type>(vectors, at);
    for (int f = 0; f < D::tail_fields; f++) {
      const int width = f == 1 && (Type == PG_U4G || Type == PG_U8G) ? 1 : D::tail_width;  // zero points are bytes
      for (int r = 0; r < kPanel; r++, at += width) memcpy(at, tails[r] + D::tail_width * f, width);
    }
  }
}

template <typename T> void transpose_panel(const pg_part& from, int64_t panel, uint8_t* to) {
  T* out = reinterpret_cast<T*>(to + panel % 2 * panel_bytes(from.type, from.k));
  for (int r = 0; r < kPanel && panel * kPanel + r < from.rows; r++) {
    const uint8_t* row = from.data + (panel * kPanel + r) * from.k * sizeof(T);
    for (int64_t k = 0; k < from.k; k++) memcpy(out + k * kPanel + r, row + k * sizeof(T), sizeof(T));
  }
}

// Of bf16: two values at a time, which stay side by side; some k of all rows, so that what is written is in the cache.
void pair_panel(const pg_part& from, int64_t panel, uint8_t* to) {
  constexpr int64_t at_once = 128, step = 2 * kPanel * 4;
  for (int64_t first = 0; first < from.k; first += at_once)
    for (int r = 0; r < kPanel && panel * kPanel + r < from.rows; r++) {
      const uint8_t* row = from.data + ((panel * kPanel + r) * from.k + first) * 2;
      uint8_t* lane = to + first / 2 * step + (panel % 2 * kPanel + r) * 4;
      const int64_t n = from.k - first < at_once ? from.k - first : at_once;
      for (int64_t i = 0; i < n / 2; i++) memcpy(lane + i * step, row + i * 4, 4);
      if (n % 2) memcpy(lane + n / 2 * step, row + (n - 1) * 2, 2);
    }
}

using RepackPanel = void (*)(const pg_part&, int64_t, uint8_t*);

template <int To> RepackPanel quantizer(int32_t from) {
  switch (from) {
    case PG_F32: return repack_panel<To, Quantize<PG_F32, To>>;
    case PG_F16: return repack_panel<To, Quantize<PG_F16, To>>;
    default: return repack_panel<To, Quantize<PG_BF16, To>>;
  }
}

RepackPanel repacker(const pg_part& from) {
  switch (from.quantize) {
    case PG_Q8_0: return quantizer<PG_Q8_0>(from.type);
    case PG_Q5_1: return quantizer<PG_Q5_1>(from.type);
    case PG_Q4_1: return quantizer<PG_Q4_1>(from.type);
  }
  switch (from.type) {
    case PG_F32: return transpose_panel<uint32_t>;
    case PG_F16: return transpose_panel<uint16_t>;
    case PG_BF16: return pair_panel;
    case PG_Q4_0: return repack_panel<PG_Q4_0>;
    case PG_Q4_1: return repack_panel<PG_Q4_1>;
    case PG_Q5_0: return repack_panel<PG_Q5_0>;
    case PG_Q5_1: return repack_panel<PG_Q5_1>;
    case PG_Q8_0: return repack_panel<PG_Q8_0>;
    case PG_Q2_K: return repack_panel<PG_Q2_K>;
    case PG_Q3_K: return repack_panel<PG_Q3_K>;
    case PG_Q4_K: return repack_panel<PG_Q4_K>;
    case PG_Q5_K: return repack_panel<PG_Q5_K>;
    case PG_IQ4_NL: return repack_panel<PG_IQ4_NL>;
    case PG_IQ4_XS: return repack_panel<PG_IQ4_XS>;
    case PG_MXFP4: return repack_panel<PG_MXFP4>;
    case PG_U4G: return repack_panel<PG_U4G>;
    case PG_U8G: return repack_panel<PG_U8G>;
    default: return repack_panel<PG_Q6_K>;
  }
}

}  // namespace

void repack(const pg_part& from, uint8_t* to, int64_t first, int64_t last) {
  RepackPanel one = repacker(from);
  const int64_t stride = panel_bytes(panel_type(from), from.k);
  for (int64_t p = first; p < last; p++) one(from, p, to + p / 2 * 2 * stride);
}

}  // namespace pagoda
