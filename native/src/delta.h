// A gated delta net (Gated DeltaNet, arXiv 2412.06464) token by token: sums go over the keys in order, so that a token's
// result has the same bits however its prompt was cut and whatever else is in the step.
#pragma once
#include "kernels.h"
#include "vec.h"

namespace pagoda {
namespace PG_NS {

constexpr int kDeltaColumns = 32;  // of a value head's state that are worked on at once, and stored together

// What a token does to the state S [key_dim][8 * C] of some columns: S = decay * S + k (share * (v - decay * S^T k))^T,
// out = S^T q.
template <int C>
PG_INLINE void delta_columns(float* s, const float* q, const float* k, int key_dim, const float* v, float decay, float share, float* out) {
  F sums[C] = {}, change[C];
  for (int i = 0; i < key_dim; i++)
    for (int c = 0; c < C; c++) sums[c] = fma(load(s + (i * C + c) * 8), splat(k[i]), sums[c]);
  for (int c = 0; c < C; c++) change[c] = (load(v + 8 * c) - sums[c] * decay) * share, sums[c] = F{};
  for (int i = 0; i < key_dim; i++)
    for (int c = 0; c < C; c++) {
      float* at = s + (i * C + c) * 8;
      const F next = fma(splat(k[i]), change[c], load(at) * decay);
      store(at, next);
      sums[c] = fma(next, splat(q[i]), sums[c]);
    }
  for (int c = 0; c < C; c++) store(out + 8 * c, sums[c]);
}

// silu of the convolution of some channels; past [kernel - 1][stride] are the inputs before, to which this one is added.
PG_INLINE void convolve(const DeltaJob& job, float* past, int64_t stride, const float* x, const float* taps, int n, float* out) {
  const int before = job.kernel - 1;
  for (int i = 0; i < n; i += 8) {
    F sum = load(past + i) * load(taps + i);
    for (int j = 1; j < before; j++) sum = fma(load(past + j * stride + i), load(taps + j * job.width + i), sum);
    const F now = load(x + i);
    sum = fma(now, load(taps + before * job.width + i), sum);
    for (int j = 1; j < before; j++) store(past + (j - 1) * stride + i, load(past + j * stride + i));
    store(past + (before - 1) * stride + i, now);
    store(out + i, sum / (exp(-sum) + 1.0f));
  }
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

// Some consecutive tokens of a request, one key head and the value heads that share it.
void delta(const DeltaJob& job, float* scratch) {
  const int dk = job.key_dim, dv = job.value_dim, shared = job.value_heads / job.key_heads, own = 2 * dk + shared * dv;
  const int64_t keys = (int64_t)job.key_heads * dk, values = (int64_t)job.value_heads * dv;
  float *past = job.state, *s = past + (job.kernel - 1) * own;
  float *q = scratch, *k = q + dk, *v = k + dk, *y = v + dv;
  for (int t = 0; t < job.tokens; t++) {
    const float* row = job.in + t * job.in_stride;
    const int64_t at = (int64_t)job.key_head * dk;
    convolve(job, past, own, row + at, job.taps + at, dk, q);
    convolve(job, past + dk, own, row + keys + at, job.taps + keys + at, dk, k);
    make_unit(q, dk, 1.0f / std::sqrt((float)dk)), make_unit(k, dk, 1.0f);
    for (int i = 0; i < shared; i++) {
      const int head = job.tiled ? job.key_head + i * job.key_heads : job.key_head * shared + i;
      const int64_t column = (int64_t)head * dv;
      convolve(job, past + 2 * dk + i * dv, own, row + 2 * keys + column, job.taps + 2 * keys + column, dv, v);
      const float *z = row + 2 * keys + values + column, *beta = row + 2 * keys + 2 * values, *slow = beta + job.value_heads;
      const float sum = slow[head] + job.dt[head];
      const float softplus = sum > 20.0f ? sum : std::log1p(std::exp(sum));
      const float decay = std::exp(-job.rate[head] * softplus), share = 1.0f / (1.0f + std::exp(-beta[head]));
      float* state = s + (int64_t)i * dk * dv;
      int c = 0;
      for (; c + kDeltaColumns <= dv; c += kDeltaColumns)
        delta_columns<kDeltaColumns / 8>(state + (int64_t)c * dk, q, k, dk, v + c, decay, share, y + c);
      for (; c < dv; c += 8) delta_columns<1>(state + (int64_t)c * dk, q, k, dk, v + c, decay, share, y + c);
      gated_norm(y, job.norm, z, dv, job.eps, job.out + t * job.out_stride + column);
    }
  }
}

// x * sigmoid(gate)
void sigmoid_gate(const float* gate, int64_t n, float* x) {
  for (int64_t i = 0; i < n; i += 8) store(x + i, load(x + i) / (exp(-load(gate + i)) + 1.0f));
}

}  // namespace PG_NS
}  // namespace pagoda
