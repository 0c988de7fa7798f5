// How repacked weights lie in memory, the same for every instruction set.
//
// A panel is 8 rows of a matrix. Quantized panels are cut into blocks of 32 along K. In a block, 8 vectors of 32 bytes
// hold the codes: vector v has k = 4v .. 4v+3, byte 4r+j is row r, k = 4v+j, so that a 32-bit lane is one row and no
// lane ever has to be shuffled. Codes are unsigned and split into bit planes, each plane again whole 32-byte vectors:
//   nibbles   4 planes: vector 2i in the low half of the bytes of plane i, vector 2i+1 in the high half
//   crumbs    2 planes: vectors 4i .. 4i+3 in bit pairs 0-1, 2-3, 4-5, 6-7 of plane i
//   bits      1 plane: vector v in bit v
// Behind the planes follow the block's scales and minima, 8 of each. The 256-deep types put their shared f16 scales in
// front of each group of 8 blocks. value = d * code + m (d, m per row and block, or per half block of 16). Q8_0 and U8G have
// signed bytes for codes; the nibbles of IQ4 types and MXFP4 number the entries of a table. A scale of MXFP4 is a byte, the
// exponent of a power of two.
// Quantized panels lie in pairs: block by block (and header by header) the first panel's, then the second's, so that a
// kernel that takes both still reads one stream. Float panels are [k][8 rows], one behind the other; but those of bf16
// lie in pairs too, two neighbouring k in a lane: [k / 2][16 rows][2], an odd k filled up with zeros.
#pragma once
#include <cstdint>

#include "pagoda.h"

namespace pagoda {

constexpr int kPanel = 8;  // rows
constexpr int kBlock = 32;
constexpr int kSuper = 8;  // blocks behind one header of a 256-deep type

struct Layout {
  int header;  // bytes in front of each 8 blocks, 0 for 32-deep types
  int block;   // bytes of one block
};

constexpr Layout layout_of(int32_t type) {
  switch (type) {
    case PG_Q4_0: case PG_IQ4_NL: return {0, 128 + 16};
    case PG_MXFP4: return {0, 128 + 8};
    case PG_Q4_1: return {0, 128 + 32};
    case PG_Q5_0: return {0, 160 + 16};
    case PG_Q5_1: return {0, 160 + 32};
    case PG_Q8_0: return {0, 256 + 16};
    case PG_Q2_K: return {32, 64 + 32};
    case PG_Q3_K: return {16, 96 + 16};
    case PG_Q4_K: return {32, 128 + 16};
    case PG_Q5_K: return {32, 160 + 16};
    case PG_Q6_K: return {16, 192 + 16};
    case PG_U4G: return {0, 128 + 24};
    case PG_U8G: return {0, 256 + 24};
    case PG_IQ4_XS: return {16, 128 + 8};
    default: return {0, 0};
  }
}

constexpr bool is_float(int32_t type) { return type == PG_F32 || type == PG_F16 || type == PG_BF16; }
constexpr bool is_iq4(int32_t t) { return t == PG_IQ4_NL || t == PG_IQ4_XS; }
constexpr bool is_signed(int32_t t) { return t == PG_Q8_0 || t == PG_U8G || is_iq4(t); }  // codes are signed bytes
constexpr int float_bytes(int32_t type) { return type == PG_F32 ? 4 : 2; }

constexpr int64_t panel_bytes(int32_t type, int64_t k) {
  if (is_float(type)) return (type == PG_BF16 ? k + k % 2 : k) * kPanel * float_bytes(type);
  Layout l = layout_of(type);
  int64_t blocks = k / kBlock;
  return blocks * l.block + (l.header ? blocks / kSuper * l.header : 0);
}

constexpr int64_t panels_of(int64_t rows) { return (rows + 2 * kPanel - 1) / (2 * kPanel) * 2; }  // whole pairs

constexpr int32_t panel_type(const pg_part& from) { return from.quantize ? from.quantize : from.type; }

struct Part {  // stacked along the rows of a weight
  int32_t type;
  int64_t rows;        // as stored; pairs of panels are padded with zero rows
  int64_t first_row;   // in the output
  int64_t first_panel;
  int64_t stride;      // bytes of a panel
  const uint8_t* data;
};

// Repack panels [first, last) of a stored row-major matrix.
void repack(const pg_part& from, uint8_t* to, int64_t first, int64_t last);

}  // namespace pagoda
