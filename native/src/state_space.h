// A state space (Mamba-2, arXiv 2405.21060) token by token: some rows of a head's state stay in registers while some tokens
// go by. Sums go over the rows in order, so that a token's result has the same bits however its prompt was cut and whatever
// else is in the step.
#pragma once
#include "delta.h"

namespace pagoda {
namespace PG_NS {

constexpr int kScanRows = kLanes<Part16> == 16 ? 8 : 4;  // of 16 columns, in registers

struct ScanGate {
  float decay, step;
};

// S = decay * S + k (step * v)^T and out += S^T q, of some rows and 16 columns of S, for consecutive tokens.
PG_INLINE void scan_rows(const ScanJob& job, const ScanGate* gates, int from, int tokens, int row, int column, float* s) {
  constexpr int lanes = kLanes<Part16>, C = 16 / lanes;
  Part16 held[kScanRows][C];
  for (int r = 0; r < kScanRows; r++)
    for (int c = 0; c < C; c++) held[r][c] = load_lanes<Part16>(s + r * 16 + c * lanes);
  for (int t = 0; t < tokens; t++) {
    const int64_t at = (from + t) * job.in_stride;
    const float *q = job.q + at + row, *k = job.k + at + row, *v = job.v + at + column;
    float* out = job.out + (from + t) * job.out_stride + column;
    const Part16 decay = splat_lanes<Part16>(gates[t].decay);
    Part16 y[C], given[C];
    for (int c = 0; c < C; c++) y[c] = load_lanes<Part16>(out + c * lanes), given[c] = load_lanes<Part16>(v + c * lanes) * gates[t].step;
    for (int r = 0; r < kScanRows; r++) {
      const Part16 qr = splat_lanes<Part16>(q[r]), kr = splat_lanes<Part16>(k[r]);
      for (int c = 0; c < C; c++) held[r][c] = fma(kr, given[c], held[r][c] * decay), y[c] = fma(held[r][c], qr, y[c]);
    }
    for (int c = 0; c < C; c++) store_lanes(out + c * lanes, y[c]);
  }
  for (int r = 0; r < kScanRows; r++)
    for (int c = 0; c < C; c++) store_lanes(s + r * 16 + c * lanes, held[r][c]);
}

// One head of some consecutive tokens. Its state is [value_dim / 16][key_dim][16].
void scan(const ScanJob& job) {
  ScanGate gates[kScanTokens];
  for (int from = 0; from < job.tokens; from += kScanTokens) {
    const int tokens = job.tokens - from < kScanTokens ? job.tokens - from : kScanTokens;
    for (int t = 0; t < tokens; t++) {
      const int64_t at = (from + t) * job.in_stride;
      const float sum = job.decay[at] + job.dt, step = sum > 20.0f ? sum : std::log1p(std::exp(sum));
      gates[t] = {std::exp(-job.rate * step), step};
      float* out = job.out + (from + t) * job.out_stride;
      for (int i = 0; i < job.value_dim; i += 8) store(out + i, load(job.v + at + i) * job.skip);
    }
    for (int column = 0; column < job.value_dim; column += 16)
      for (int row = 0; row < job.key_dim; row += kScanRows)
        scan_rows(job, gates, from, tokens, row, column, job.state + (int64_t)column * job.key_dim + row * 16);
  }
}

// silu of the convolution of some channels of consecutive tokens, in place.
void convolve_channels(const ConvJob& job) {
  for (int from = 0; from < job.tokens; from += kScanTokens) {
    ConvJob some = job;
    some.in += from * job.in_stride, some.out += from * job.out_stride;
    some.tokens = job.tokens - from < kScanTokens ? job.tokens - from : kScanTokens;
    convolve(some);
  }
}

// x = rmsnorm(x * silu(z)) * weight
void norm_gated(const float* z, const float* weight, int64_t n, float eps, float* x) {
  F sum = {};
  for (int64_t i = 0; i < n; i += 8) {
    const F value = load(x + i) * (load(z + i) / (exp(-load(z + i)) + 1.0f));
    store(x + i, value);
    sum = fma(value, value, sum);
  }
  const float scale = 1.0f / std::sqrt(sum_lanes(sum) / (float)n + eps);
  for (int64_t i = 0; i < n; i += 8) store(x + i, load(x + i) * scale * load(weight + i));
}

}  // namespace PG_NS
}  // namespace pagoda
