// The C interface of the native CPU library: weights, a program of operations over buffers, steps. Called by ctypes.
#pragma once
#include <cstdint>

#pragma GCC visibility push(default)
extern "C" {

// Storage types of weights: the ids of the GGUF specification, and from 100 our own (see weights/ggml.py).
enum pg_type : int32_t {
  PG_F32 = 0, PG_F16 = 1, PG_Q4_0 = 2, PG_Q4_1 = 3, PG_Q5_0 = 6, PG_Q5_1 = 7, PG_Q8_0 = 8, PG_Q2_K = 10, PG_Q3_K = 11,
  PG_Q4_K = 12, PG_Q5_K = 13, PG_Q6_K = 14, PG_IQ4_NL = 20, PG_IQ4_XS = 23, PG_BF16 = 30,
  PG_MXFP4 = 39,
  PG_U4G = 100, PG_U8G = 101,
};

enum pg_op_kind : int32_t {
  PG_EMBED = 0,      // out = rows of weight for the step's tokens, times f (0: 1); or the step's vectors where it gives them;
                     // ADD adds to out, of tokens with vectors the row of token `layer`
  PG_NORM = 1,       // out = rmsnorm(in) * vector, of each of `layer` parts of a row, if any; eps in f; ADD adds to out, and
                     // norms `in` in place, and then multiplies out by f2 (0: 1)
  PG_GATHER = 2,     // out (rows of logits) = the rows of `in` that want logits; a wider out takes those behind them too
  PG_MATMUL = 3,     // out = in * weight^T (+ vector); ADD adds to out
  PG_ROPE = 4,       // qkv in place: norms (vector, vector2, eps in f), rotation; keys and values go to the cache, if any
  PG_ATTENTION = 5,  // out = attention of the queries in `in` over the cache of `layer`; scale in f, soft cap in f2; vector:
                     // a logit for each head that takes a share of its attention, if any
  PG_SILU = 6,       // out = silu(in[:, :n]) * in[:, n:]
  PG_HEAD = 7,       // logits of `in` by weight, soft cap in f2, then the rows are scored or sampled
  PG_HIDDEN = 8,     // the rows of logits of `in` are the step's hidden states, of which a row may have several: the `layer`-th
  PG_POSITIONS = 9,  // out += row (position + layer) of the table `vector`, and row 0 or 1 of the table `vector2`, if any
  PG_LAYER_NORM = 10,  // out = layernorm(in) * vector (+ vector2), by parts as PG_NORM; eps in f
  PG_GELU = 11,        // out = gelu(in)
  PG_ATTEND_ALL = 12,  // out = attention of the queries in `in` over the tokens of their request before and behind; scale in f
  PG_ROUTE = 13,         // `in` holds the router's logits: chooses the experts of each row, for what follows in the layer;
                         // vector: added to their shares for the choice alone, if any; vector2: a weight of each, that
                         // multiplies its share, if any
  PG_EXPERTS_UP = 14,    // out = silu(in * gate^T) * (in * up^T) by the experts of each row; weight (and
                         // vector, their biases, if any): gate, up, gate, up, ...; CLAMPED, GELU_UP: the other function instead
                         // of silu; SQUARED: out = the square of what of in * up^T is above 0; weight: up, up, ...
  PG_EXPERTS_DOWN = 15,  // out += each row's shares of `in` * down^T (+ vector) by its experts
  PG_GATED = 16,         // out *= sigmoid(in * vector)
  PG_PATCHES = 17,       // out = the pixels of the step's picture that are each row's patch, normalized, and zeros behind them
  PG_QUICK_GELU = 18,    // out = in * sigmoid(1.702 in)
  PG_GELU_TANH = 19,     // out = gelu(in), by tanh
  PG_DELTA = 20,         // out = gated delta net of q, k, v, z, beta, decay in `in`, with the state `layer` of each request;
                         // vector: taps of the convolution [kernel][channels]; vector2: rate and dt of each value head,
                         // then the norm; eps in f. With key_dim 0 a short convolution: out = c * (convolution of
                         // b * u), of b, u, c in `in`, with such taps; the channels are cut into `key_heads` parts
  PG_CONVOLVE = 43,      // in = silu of the convolution of its first channels in place, with the state `layer` of each request;
                         // vector: taps [kernel][channels], then a bias of each
  PG_SCAN = 44,          // out = state space of q, k, v, z, decay in `in`, with the state `layer` of each request; vector: rate,
                         // dt and skip of each head
  PG_NORM_GATED = 45,    // out = rmsnorm(out * silu(in from column `layer` on)) * vector, of each of `window` parts; eps in f
  PG_OUT_GATE = 21,      // out *= sigmoid(in from column `layer` on)
  PG_GATED_GELU_TANH = 22,  // out = gelu(in[:, :n]) * in[:, n:], by tanh
  PG_LATENT_KEY = 23,    // out behind its heads = the key of latent attention: of `in` from column `layer` on first what turns,
                         // which stands behind the rest there, then rmsnorm(the rest) * vector; eps in f
  PG_ABSORB = 24,        // each head of out = what turns of that head of `in`, then the rest of it * weight^T, its own part
  PG_EXPAND = 25,        // each head of out = that head of `in` * weight^T, its own part
  PG_ADD_VECTORS = 26,   // out += the `layer`-th of the step's vectors of a token, where it has such
  PG_ADAPT = 28,         // out += what the adapters of the rows' requests add to the product of `in` and weight, which is
                         // stacked of `layer` matrices
  PG_MEAN = 40,          // out = the mean of the `layer` parts of a row of `in`
  PG_GATED_GELU = 41,    // out = gelu(in[:, :n]) * in[:, n:]
  PG_ZERO = 50,          // out = 0
  PG_GELU_TIMES = 51,    // out = gelu(out) * in from column `layer` on, by tanh
  PG_RELU2 = 42,         // out = the square of what of in is above 0
  PG_GRID = 27,          // out += the positions of the table `vector` with `layer` rows and columns, spread over the picture
  PG_ADD_SCALED = 48,    // out += in * vector
};

enum pg_op_flags : int32_t {
  PG_ADD = 1,          // matmul, norm: add to out
  PG_QUANTIZE = 2,     // set by pg_program: also make the forms of out that products read, in 8 bits or bf16
  PG_LOGIT_ROWS = 4,   // runs over rows of logits instead of tokens
  PG_FRAMES = 8,       // attend all: over the tokens of the frame instead of the request
  PG_CLAMPED = 32,     // experts up: clamped(gate, up) = min(gate, 7) * sigmoid(1.702 min(gate, 7)) * (up within -7 and 7, + 1)
  PG_SQUARED = 1024,   // experts up: they have no gate
  PG_LOCAL = 128,      // rope: by the second table of angles; rope, attention: the heads and the cache are dims.local's
  PG_PIECES = 16,      // such operations in a row are done for some tokens before they are for the next
  PG_STILL = 64,       // rope: nothing is turned
  PG_WHOLE = 256,      // rope: the norms are over all heads of q, and of k, together
  PG_LATE = 512,       // rope: the norms come behind the rotation
  PG_QUERIES = 2048,   // rope: there are no keys and values, and nothing goes to the cache
  PG_NORM_VALUES = 4096,  // rope: values are normed too, without weights
  PG_GELU_UP = 8192,   // experts up: gelu(gate) * up, by tanh
};

struct pg_part {  // one stored matrix [rows, k], row-major blocks
  const uint8_t* data;
  int64_t rows, k;
  int32_t type;
  int32_t quantize;  // 0, or what a float matrix becomes when it is repacked: PG_Q8_0, PG_Q5_1 or PG_Q4_1
};

enum pg_rows : int32_t {
  PG_TOKENS = 0,  // a row for each token of a step
  PG_LOGITS = 1,  // for the rows of logits that are worked on together
  PG_PIECE = 2,   // for dims.piece_rows tokens: written and read by operations with PG_PIECES only
};

struct pg_buffer {
  int64_t width;
  int32_t rows;  // what it is sized for: PG_TOKENS, ...
};

struct pg_op {
  int32_t kind, in, out, weight, vector, vector2, layer, flags;
  float f;
  int32_t window;  // of attention: how many positions a token sees, its own included, to each side that it sees; 0 for all
  int32_t order;   // out is put in this order, before it is quantized, for a weight whose k are in it; 0 for none
  float f2;        // a soft cap c: values x become c * tanh(x / c); 0 for none
};

struct pg_delta {  // of gated delta nets; layers 0: there is none
  int32_t layers, key_heads, value_heads, key_dim, value_dim, kernel, tiled;
  int32_t slots;  // states that there is room for: of requests, then kept ones
  int32_t parts;  // of state spaces: the channels of their convolution are cut into so many; 0: there are none
  int64_t channels() const { return 2 * (int64_t)key_heads * key_dim + (int64_t)value_heads * value_dim; }
};

struct pg_latent {  // of latent attention; rank 0: there is none. A value is the last `rank` values of its key
  int32_t rank, nope, value_dim;  // nope: of a query, what does not turn; value_dim: of a head, behind PG_EXPAND
};

struct pg_heads {  // of a second kind of layers; head_dim 0: they are as the others
  int32_t layers, kv_heads, head_dim, rope_dim;
};

struct pg_router {  // of a mixture
  int32_t experts, active, normalized;  // normalized: the shares of the chosen ones add up to 1, times scale
  int32_t sigmoid;                      // shares are the sigmoid of each expert's logit; 0: the softmax over all
  int32_t groups, active_groups, group_best;  // experts are chosen from the active_groups best, by the sum of the group_best best
  float scale;
};

// How the cache keeps keys and values. PG_KV_BF16 is PG_KV_F16 where the processor has no products of bfloat16.
enum { PG_KV_F16 = 0, PG_KV_INT8 = 1, PG_KV_BF16 = 2 };

struct pg_dims {
  int32_t layers, heads, kv_heads, head_dim, vocab, max_tokens, max_rows, num_blocks;
  int32_t rope_dim, rope_interleaved;
  float rope_factor;
  const double* inv_freq;  // [rope_dim / 2]
  int32_t kv;              // PG_KV_*; PG_KV_BF16 lets attention without a cache round to it too
  pg_router router;        // experts 0: there are none
  int32_t piece_rows;      // tokens of a piece
  const int32_t* rope_axes;  // [rope_dim / 2] by which of the step's three rope positions each pair turns, or null
  pg_delta delta;
  const double* local_inv_freq;  // of a second table of angles, [local.rope_dim / 2] or as the first; or null
  float local_factor;
  float query_beta;          // the query at position p is multiplied by 1 + query_beta * ln(1 + p / query_length)
  int32_t query_length;
  pg_latent latent;
  pg_heads local;  // of operations with PG_LOCAL
};

struct pg_low_rank {  // what an adapter adds to a product: (in * down^T) * up^T, to the outputs from `column` on
  int32_t weight;
  int64_t rank, column, outputs;
  const float *down, *up;  // [rank, k], [outputs, rank]
};

struct pg_picture {
  const uint8_t* pixels;  // [frames, height, width, 3]
  int32_t frames, height, width;
  int32_t patch_size, together;  // of a patch: pixels of a side, and frames; the last one is repeated where they are short
  float mean[3], spread[3];      // a value is (pixel - mean) / spread of its channel; channel, frame, row, column
};

struct pg_step {
  int32_t requests, tokens_count, rows_count, table_width, top_width, mask_width;
  const int32_t *slots, *starts, *positions, *tokens, *block_tables;
  const int32_t *rows, *row_request, *row_target, *row_top;
  const float* temperature;
  const int32_t* top_k;
  const float *top_p, *min_p, *presence, *frequency, *repetition;
  const uint64_t* seed;
  const int32_t *history_start, *history_ids, *history_counts, *bias_start, *bias_ids;
  const float* bias_values;
  const int32_t* row_mask;
  const uint32_t* masks;
  const int32_t* second_texts;  // [requests] the position where a second text begins, or null
  const int32_t* rope_positions;  // [3, tokens_count], or null: a token turns by its position
  const int32_t* adapters;        // [requests] the place of a request's adapter, -1 for none; or null: no request has one
  const int32_t* last_seen;       // [tokens_count] the last position that a token sees, or null: its own
  const int32_t* kept;            // [requests][3] or null: the slot whose state a request begins with, -1 for its own; the slot that gets
                                  // the state which the request has before a position, -1 for none; that position
  const float* vectors;           // rows of vectors_width values: vectors as wide as what they are put into; or null
  const int32_t* vector_of;       // [tokens_count] the vector that a token takes, -1 for its embedding; null: all do
  const int32_t* frames;          // [frames_count + 1] where frames of a picture begin, for PG_FRAMES
  int32_t frames_count, vectors_width, hidden_width;  // hidden_width: of a row of out_hidden
  const pg_picture* picture;  // for PG_PATCHES; rope_positions are the group of frames, row and column of each patch then
  // results
  int32_t* out_tokens;
  float* out_logprobs;
  int32_t* out_top_ids;
  float* out_top_logprobs;
  uint8_t* out_ok;
  float* out_logits;  // [rows_count, vocab] or null; raw logits, for tests
  float* out_hidden;  // [rows_count, hidden_width] or null
};

struct pg_context;

// The instruction sets this machine can run, the best first: of "amx", "avx512-bf16", "avx512", "avx2", "neon-dotprod", "neon",
// "generic". Null past the last.
const char* pg_isa(int32_t i);
const char* pg_best_isa();
// threads >= 1; isa one of those names. Null if this machine cannot run it.
pg_context* pg_create(int32_t threads, const char* isa);
void pg_destroy(pg_context*);
const char* pg_error(pg_context*);
// Repack one or more matrices with the same k, stacked along rows. Returns its id, or -1 (see pg_error).
int32_t pg_weight(pg_context*, const pg_part* parts, int32_t n_parts);
// Stack more matrices of that k behind those of a weight. 0, or -1.
int32_t pg_extend(pg_context*, int32_t weight, const pg_part* parts, int32_t n_parts);
int32_t pg_vector(pg_context*, const float* data, int64_t n);
// The k-th of n values is the one that was at places[k]. Returns a number for pg_op's `order`, from 1.
int32_t pg_order(pg_context*, const int32_t* places, int64_t n);
int64_t pg_weight_bytes(pg_context*);
// Bytes that a matrix [rows, k] will take once repacked; -1 for a type or k that cannot run.
int64_t pg_matrix_bytes(int32_t type, int64_t rows, int64_t k);
// Fix the program. Allocates buffers and the KV cache (touched only as it is used). 0, or -1 (see pg_error).
int32_t pg_program(pg_context*, const pg_dims*, const pg_buffer*, int32_t n_buffers, const pg_op*, int32_t n_ops);
int64_t pg_activation_bytes(pg_context*);
// Put an adapter in a place, instead of the one there; its matrices are copied. Between steps. 0, or -1 (see pg_error).
int32_t pg_adapt(pg_context*, int32_t place, const pg_low_rank* pairs, int32_t n_pairs);
// Give the memory of the buffers back to the system, until they are written again.
void pg_release(pg_context*);
// Take one huge page more of the cache from the system, of those that lie within so many bytes behind what steps have
// used: 1, or 0 where they are there. Only with no step started.
int32_t pg_touch(pg_context*, int64_t ahead_bytes);
// Start one step on the team's other threads, and return; its arrays must stay until pg_wait. 0, or -1.
int32_t pg_start(pg_context*, const pg_step*);
// Work on the step that was started, if there is one, until it is done.
void pg_wait(pg_context*);
// A step in parts: take it, in place of one that was begun; 0, or -1. What it points to must stay as it is.
int32_t pg_begin(pg_context*, const pg_step*);
// Go on with it for about so many seconds, by whole operations, at least one. 1 once all of it is done, else 0. How it
// is cut changes no bit of what comes out.
int32_t pg_continue(pg_context*, double seconds);
}
#pragma GCC visibility pop
