// A gated delta net (Gated DeltaNet, arXiv 2412.06464) token by token, some of them in a row for each part of the state that
// fits the nearest cache: sums go over the keys in order, so that a token's result has the same bits however its prompt was
// cut and whatever else is in the step.
#pragma once
#include "kernels.h"
#include "wide.h"

namespace pagoda {
namespace PG_NS {

constexpr int kDeltaColumns = 32;        // of a value head's state that are worked on at once, and stored together
constexpr float kLeastScale = 0x1p-16f;  // S is kept without its last decays, as long as their product is not below this

struct DeltaGate {
  float scale;  // the product of decays that S has to be multiplied by, this token's included
  float share;
};

// Consecutive tokens of one value head, of each q, k [key_dim] and v, out [value_dim]: S = decay * S + k (share * (v - decay
// * S^T k))^T, out = S^T q. What is stored is S / scale, so that most tokens need not multiply it: their decays go to the scale.
struct DeltaTile {
  const float *q, *k, *v;
  float* out;
  const DeltaGate* gates;
  int tokens, key_dim, value_dim;
};

template <typename V> constexpr int kLanes = sizeof(V) / sizeof(float);
template <typename V> PG_INLINE V load_lanes(const float* p) {
  if constexpr (kLanes<V> == 8) return load(p); else return load_wide(p);
}
template <typename V> PG_INLINE V splat_lanes(float x) {
  if constexpr (kLanes<V> == 8) return splat(x); else return splat_wide(x);
}
PG_INLINE void store_lanes(float* p, F v) { store(p, v); }
#if defined(PG_VNNI)
PG_INLINE void store_lanes(float* p, W v) { store_wide(p, v); }
#endif

// Token t of a tile, on C vectors of columns, of what is stored [key_dim][C]. `sums` are those columns^T k, and then of the
// token behind it, if there is one: the columns are read once for each token.
template <typename V, int C, bool Rescale, bool Last>
PG_INLINE void delta_token(float* s, const DeltaTile& tile, int t, int column, V* sums) {
  constexpr int lanes = kLanes<V>;
  const DeltaGate& gate = tile.gates[t];
  const float *q = tile.q + t * tile.key_dim, *k = tile.k + t * tile.key_dim, *next_k = Last ? k : k + tile.key_dim;
  const int64_t at = (int64_t)t * tile.value_dim + column;
  const float share = Rescale ? gate.share : gate.share / gate.scale;
  V change[C], y[C] = {};
  for (int c = 0; c < C; c++) change[c] = (load_lanes<V>(tile.v + at + lanes * c) - sums[c] * gate.scale) * share, sums[c] = V{};
  for (int i = 0; i < tile.key_dim; i++) {
    const V ki = splat_lanes<V>(k[i]), qi = splat_lanes<V>(q[i]), next_ki = splat_lanes<V>(next_k[i]);
    for (int c = 0; c < C; c++) {
      float* p = s + (i * C + c) * lanes;
      const V before = load_lanes<V>(p), now = fma(ki, change[c], Rescale ? before * gate.scale : before);
      store_lanes(p, now);
      y[c] = fma(now, qi, y[c]);
      if (!Last) sums[c] = fma(now, next_ki, sums[c]);
    }
  }
  for (int c = 0; c < C; c++) store_lanes(tile.out + at + lanes * c, Rescale ? y[c] : y[c] * gate.scale);
}

template <typename V, int C> PG_INLINE void delta_columns(float* s, const DeltaTile& tile, int column) {
  V sums[C] = {};
  for (int i = 0; i < tile.key_dim; i++)
    for (int c = 0; c < C; c++) sums[c] = fma(load_lanes<V>(s + (i * C + c) * kLanes<V>), splat_lanes<V>(tile.k[i]), sums[c]);
  for (int t = 0; t < tile.tokens; t++) {
    const bool last = t + 1 == tile.tokens, rescale = !(tile.gates[t].scale >= kLeastScale);
    if (rescale && last) delta_token<V, C, true, true>(s, tile, t, column, sums);
    else if (rescale) delta_token<V, C, true, false>(s, tile, t, column, sums);
    else if (last) delta_token<V, C, false, true>(s, tile, t, column, sums);
    else delta_token<V, C, false, false>(s, tile, t, column, sums);
  }
}

// Kernel is the size of the convolution, 0: as the job says.
template <int Kernel> PG_INLINE void convolve_by(const ConvJob& job) {
  const int before = (Kernel ? Kernel : job.kernel) - 1;
  F window[Kernel ? Kernel : kMaxKernel], tap[Kernel ? Kernel : kMaxKernel];
  for (int i = 0; i < job.n; i += 8) {
    const F bias = job.bias ? load(job.bias + i) : F{};
    for (int j = 0; j < before; j++) window[j] = load(job.past + j * job.past_stride + i);
    for (int j = 0; j <= before; j++) tap[j] = load(job.taps + j * job.width + i);
    for (int t = 0; t < job.tokens; t++) {
      window[before] = load(job.in + t * job.in_stride + i);
      F sum = fma(window[0], tap[0], bias);
      for (int j = 1; j <= before; j++) sum = fma(window[j], tap[j], sum);
      for (int j = 0; j < before; j++) window[j] = window[j + 1];
      store(job.out + t * job.out_stride + i, sum / (exp(-sum) + 1.0f));
    }
    for (int j = 0; j < before; j++) store(job.past + j * job.past_stride + i, window[j]);
  }
}

PG_INLINE void convolve(const ConvJob& job) {
  if (job.kernel == 4) convolve_by<4>(job);
  else convolve_by<0>(job);
}

PG_INLINE void make_unit(float* x, int n, float scale) {
  F sum = {};
  for (int i = 0; i < n; i += 8) sum = fma(load(x + i), load(x + i), sum);
  const float by = scale / std::sqrt(sum_lanes(sum) + 1e-6f);
  for (int i = 0; i < n; i += 8) store(x + i, load(x + i) * by);
}

// RMS norm of what a value head gives, times silu(z).
PG_INLINE void gated_norm(const float* x, const float* weight, const float* z, int n, float eps, float* out) {
  F sum = {};
  for (int i = 0; i < n; i += 8) sum = fma(load(x + i), load(x + i), sum);
  const float scale = 1.0f / std::sqrt(sum_lanes(sum) / (float)n + eps);
  for (int i = 0; i < n; i += 8) store(out + i, load(x + i) * scale * load(weight + i) * (load(z + i) / (exp(-load(z + i)) + 1.0f)));
}

// Of consecutive tokens of a value head, at x its beta and decay; `scale` is that of its state, 0 where it is new.
PG_INLINE void find_gates(const DeltaJob& job, const float* x, int head, int tokens, float& scale, DeltaGate* gates) {
  for (int t = 0; t < tokens; t++, x += job.in_stride) {
    const float sum = x[job.value_heads] + job.dt[head];
    const float softplus = sum > 20.0f ? sum : std::log1p(std::exp(sum));
    const float now = (scale > 0.0f ? scale : 1.0f) * std::exp(-job.rate[head] * softplus);
    gates[t] = {now, 1.0f / (1.0f + std::exp(-x[0]))};
    scale = now >= kLeastScale ? now : 1.0f;
  }
}

// Some consecutive tokens of a request, one key head and the value heads that share it.
void delta(const DeltaJob& job, float* scratch) {
  const int dk = job.key_dim, dv = job.value_dim, shared = job.value_heads / job.key_heads, own = 2 * dk + shared * dv;
  const int64_t keys = (int64_t)job.key_heads * dk, values = (int64_t)job.value_heads * dv, at = (int64_t)job.key_head * dk;
  float *past = job.state, *s = past + (job.kernel - 1) * own, *scales = s + (int64_t)shared * dk * dv;
  float *q = scratch, *k = q + kDeltaTokens * dk, *v = k + kDeltaTokens * dk, *y = v + kDeltaTokens * dv;
  DeltaGate gates[kDeltaTokens];
  for (int first = 0; first < job.tokens; first += kDeltaTokens) {
    const int count = job.tokens - first < kDeltaTokens ? job.tokens - first : kDeltaTokens;
    const float* row = job.in + first * job.in_stride;
    const auto convolved = [&](int64_t channel, int n, float* before, float* out) {
      convolve({row + channel, job.in_stride, out, n, count, n, job.kernel, job.taps + channel, nullptr, job.width, before, own});
    };
    convolved(at, dk, past, q), convolved(keys + at, dk, past + dk, k);
    for (int t = 0; t < count; t++) make_unit(q + t * dk, dk, 1.0f / std::sqrt((float)dk)), make_unit(k + t * dk, dk, 1.0f);
    for (int i = 0; i < shared; i++) {
      const int head = job.tiled ? job.key_head + i * job.key_heads : job.key_head * shared + i;
      const int64_t column = (int64_t)head * dv;
      convolved(2 * keys + column, dv, past + 2 * dk + i * dv, v);
      find_gates(job, row + 2 * keys + 2 * values + head, head, count, scales[i], gates);
      const DeltaTile tile = {q, k, v, y, gates, count, dk, dv};
      float* state = s + (int64_t)i * dk * dv;
      int c = 0;
      for (; c + kDeltaColumns <= dv; c += kDeltaColumns) delta_columns<Part16, kDeltaColumns / kLanes<Part16>>(state + (int64_t)c * dk, tile, c);
      for (; c < dv; c += 8) delta_columns<F, 1>(state + (int64_t)c * dk, tile, c);
      for (int t = 0; t < count; t++)
        gated_norm(y + t * dv, job.norm, row + t * job.in_stride + 2 * keys + values + column, dv, job.eps,
                   job.out + (first + t) * job.out_stride + column);
    }
  }
}

// x * sigmoid(gate)
void sigmoid_gate(const float* gate, int64_t n, float* x) {
  for (int64_t i = 0; i < n; i += 8) store(x + i, load(x + i) / (exp(-load(gate + i)) + 1.0f));
}

}  // namespace PG_NS
}  // namespace pagoda
