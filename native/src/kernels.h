// The table of kernels: one for each instruction set, all with the same arithmetic in the same order.
#pragma once
#include <cstdint>

#include "layout.h"

namespace pagoda {

struct Rows {  // activations of a matmul: float rows, and their 8-bit form if the weight is quantized
  const float* f;
  const int8_t* q;
  const float* d;  // scale of each block of 32
  const float* s;  // scale * sum of the codes of each block of 32
  const int32_t* n;  // the sum of the codes of each block of 32
  const int32_t* h;  // of each half block of 16
  const int16_t* wide;  // see Codes
  const uint16_t* bf16;
  int64_t k;
};

struct Codes {  // where the other forms of a row go, each null if no product reads it
  int8_t* q;
  float *d, *s;
  int32_t *n, *h;
  int16_t* wide;  // in 16 bits, in each block the even codes in front of the odd ones
  uint16_t* bf16;
};

struct Out {
  float* data;
  int64_t stride;     // floats
  const float* bias;  // one per column, or null
  bool add;           // add to what is there
};

constexpr int kTokens = 16;       // tokens of a KV block
constexpr int kSegment = 512;     // tokens attended at a time, cut at absolute positions
constexpr int kQueryVectors = 32; // query vectors of one attention job
constexpr int kMaxHeadDim = 1024;

constexpr int kKvGroup = 32;      // values of a head that share a scale in an 8-bit cache

// [block][layer][kv head] of K [head_dim][16], then V [16][head_dim]: in f16, or in signed bytes, and behind them the
// f16 scales of K and those of V, [groups of head_dim][16] each. In bf16 two values of a key, and those of two tokens,
// lie side by side: K [head_dim / 2][16][2], V [8][head_dim][2]. Where the values are a part of the keys there is no V.
struct KvCache {
  uint8_t* data;
  int layers, heads, head_dim;
  int kind;        // PG_KV_*
  int turned = 0;  // > 0: the value of a token is its key from here on
  int64_t block_bytes = 0;  // from block to block, which may hold another such cache
  int value_dim() const { return head_dim - turned; }
  int64_t both() const { return turned > 0 ? 1 : 2; }
  int64_t values() const { return (int64_t)kTokens * head_dim; }  // of K or V in a block
  int64_t scales() const { return (int64_t)kTokens * ((head_dim + kKvGroup - 1) / kKvGroup); }
  int64_t stride() const { return both() * (kind == PG_KV_INT8 ? values() + 2 * scales() : 2 * values()); }
  int64_t own_bytes() const { return (int64_t)layers * heads * stride(); }  // of a block
  uint8_t* at(int layer, int64_t block, int head) const { return data + block * block_bytes + (layer * heads + head) * stride(); }
};

struct AttentionJob {  // consecutive tokens of one request, the query heads of one KV head
  const KvCache* cache;
  const int32_t* table;  // blocks of the request
  int layer, kv_head, group;
  int tokens, position;  // of the first token
  const float* q;        // first token, first head of the group
  int64_t q_stride;      // floats from token to token
  float* out;
  int64_t out_stride;
  float scale;
  int window;  // positions that a token sees, its own included
  const float* sinks;  // of the heads of the group, or null
  float soft_cap;      // of scores; 0: none
  const int32_t* last_seen;  // the last position that each token sees, or null: its own
};

constexpr int kEncoderQueries = 384;  // of one encoder job
constexpr int kKeys = 256;           // keys attended at a time

struct EncoderJob {  // consecutive tokens of one request, one head, over all its tokens
  const float *q, *k, *v;  // first query; first key and value of the request
  int64_t stride;          // floats from token to token
  int count, keys, dim;    // queries, keys, head size
  int from, window;        // place of the first query; keys as many places away, or more, are not seen
  float scale;
  float* out;
  int64_t out_stride;
  bool bf16;  // whether queries, keys, values and weights may be rounded to it
};

constexpr int kDeltaTokens = 8;  // that go through a part of a state together, while it is in the nearest cache
constexpr int kMaxKernel = 16;   // inputs of a convolution

struct DeltaJob {  // consecutive tokens of one request, one key head of a gated delta net and its value heads
  const float* in;  // first token: q, k, v, z of all heads, then of each value head beta, then decay
  int64_t in_stride;
  float* out;  // first token, first value head
  int64_t out_stride;
  int tokens, key_head, key_heads, value_heads, key_dim, value_dim, kernel;
  bool tiled;          // value heads take key heads in turns
  const float* taps;   // [kernel][width]
  int64_t width;       // channels of the convolution
  const float *rate, *dt, *norm;  // of each value head; of all
  float eps;
  float* state;  // see delta_state
};

// silu of the convolution of n channels of consecutive tokens, each by itself. past [kernel - 1][past_stride] are its inputs
// before the first token, and become those before the next. `in` may be `out`.
struct ConvJob {
  const float* in;
  int64_t in_stride;
  float* out;
  int64_t out_stride;
  int tokens, n, kernel;
  const float *taps, *bias;  // [kernel][width]; of each channel, or null
  int64_t width;
  float* past;
  int64_t past_stride;
};

constexpr int kScanTokens = 16;  // that go by together, while some of a state is in registers

struct ScanJob {  // consecutive tokens of one request, one head of a state space
  const float *q, *k, *v, *decay;  // of the first token
  int64_t in_stride;
  float* out;
  int64_t out_stride;
  int tokens, key_dim, value_dim;
  float rate, dt, skip;
  float* state;
};

// Floats that `channels` of a state space's convolution keep of a request, in whole cache lines.
constexpr int64_t conv_state(int64_t channels, int64_t kernel) { return ((kernel - 1) * channels + 15) / 16 * 16; }

// Floats that a key head keeps of a request: inputs of the convolution, then S of its `shared` value heads, without a scale,
// then those scales. A whole number of cache lines, or vectors would lie across two.
constexpr int64_t delta_state(int64_t key_dim, int64_t value_dim, int64_t shared, int64_t kernel) {
  return ((kernel - 1) * (2 * key_dim + shared * value_dim) + shared * key_dim * value_dim + (key_dim ? shared : 0) + 15) / 16 * 16;
}

// Floats of scratch that `delta` needs.
constexpr int64_t delta_scratch(int64_t key_dim, int64_t value_dim) { return 2 * kDeltaTokens * (key_dim + value_dim); }

struct Kernels {
  const char* name;
  bool wide;  // products read Rows::wide
  int chain_rows;  // that pay for a chain of phases, times the square of the number of chains: see step.cpp
  void (*matmul)(const Part&, int64_t first_panel, int64_t last_panel, const Rows&, int64_t first, int64_t last, const Out&);
  void (*dequantize_row)(const Part&, int64_t k, int64_t row, float* out);
  void (*norm)(const float* x, const float* weight, int64_t n, float eps, float* out);
  void (*quantize)(const float* x, int64_t n, const Codes& to);
  void (*silu)(const float* gate, const float* up, int64_t n, float* out);
  void (*rotate)(float* head, const float* cos, const float* sin, int dim, bool interleaved);
  void (*store_kv)(const KvCache&, int layer, int64_t block, int head, int offset, const float* k, const float* v);
  void (*attention)(const AttentionJob&, float* scratch);
  // The same in parts, with the same bits: segment `index` of a job into partials [queries][head_dim + 2], ...
  void (*attention_segment)(const AttentionJob&, int index, float* partials, float* scratch);
  // ... and the segments, `stride` floats from one to the next, joined in order.
  void (*attention_join)(const AttentionJob&, const float* partials, int64_t stride, int segments, float* scratch);
  // Largest value; NaN if any is NaN.
  float (*row_max)(const float* x, int64_t n);
  // out = exp((x - top) * scale); returns the sum. out may be null.
  double (*exp_row)(const float* x, int64_t n, float top, float scale, float* out);
  void (*layer_norm)(const float* x, const float* weight, const float* bias, int64_t n, float eps, float* out);
  void (*gelu)(const float* x, int64_t n, float* out);
  void (*clamped)(const float* gate, const float* up, int64_t n, float* out);  // see PG_CLAMPED
  void (*gelu_gated)(const float* gate, const float* up, int64_t n, float* out);  // by tanh
  void (*quick_gelu)(const float* x, int64_t n, float* out);
  void (*gelu_tanh)(const float* x, int64_t n, float* out);
  void (*attend_all)(const EncoderJob&, float* scratch);
  void (*delta)(const DeltaJob&, float* scratch);
  void (*convolve)(const ConvJob&);
  void (*scan)(const ScanJob&);
  void (*norm_gated)(const float* z, const float* weight, int64_t n, float eps, float* x);
  void (*sigmoid_gate)(const float* gate, int64_t n, float* x);
  // x = cap * tanh(x / cap)
  void (*soft_cap)(float* x, int64_t n, float cap);
  // To the nearest bf16, ties to even; or null: neither products nor attention multiply bf16 by bf16.
  void (*to_bf16)(const float* x, int64_t n, uint16_t* to);
};

enum class Form { floats, codes, bf16 };

// What products with such a weight read of activations.
inline Form form_of(const Kernels& kernels, int32_t type, int64_t k) {
  if (!is_float(type)) return Form::codes;
  return type == PG_BF16 && kernels.to_bf16 && k % 2 == 0 ? Form::bf16 : Form::floats;
}

// Floats of scratch that `attention` needs.
constexpr int64_t attention_scratch(int head_dim) { return kQueryVectors * (int64_t)(kSegment + 3 * head_dim + 2); }

// Floats of scratch that `attend_all` needs.
constexpr int64_t encoder_scratch(int head_dim) { return 2 * (int64_t)head_dim * (kEncoderQueries + kKeys) + 8 * kKeys + head_dim; }

const Kernels* kernels_generic();
#if defined(__x86_64__)
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();
const Kernels* kernels_bf16();
const Kernels* kernels_amx();
#elif defined(__aarch64__)
const Kernels* kernels_neon();
const Kernels* kernels_dotprod();
#endif

}  // namespace pagoda
