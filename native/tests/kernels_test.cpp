// The kernels of every instruction set this machine has: products and attention against plain double arithmetic, the
// rest against the generic table. An argument names the instruction set that has to be found the best.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <vector>

#include "context.h"
#include "samples.h"

using namespace pagoda;

namespace {

int failures = 0;

void check(bool good, const char* isa, const char* what, int detail = 0) {
  if (good) return;
  std::printf("FAILED: %s %s %d\n", isa, what, detail);
  failures++;
}

bool close(float a, double b, double size, double bound = 1e-5) { return std::abs(a - b) <= bound * size; }

bool all_close(const std::vector<float>& a, const std::vector<float>& b) {
  for (size_t i = 0; i < a.size(); i++)
    if (!close(a[i], b[i], std::abs(b[i]) + 1e-6)) return false;
  return true;
}

void test_product(const Kernels& t, int32_t type) {
  const int64_t k = 512, rows = 30, panels = 4;
  const std::vector<uint8_t> w = random_panels(type, panels, k);
  const Part part = {type, rows, 0, 0, panel_bytes(type, k), w.data()};
  const int m = 19;  // tiles of several sizes; m = 1 and 2 below
  const std::vector<float> x = normal(m * k);
  const Quantized codes(t, x);
  const Rows a = codes.rows(x, k);
  std::vector<float> out(m * panels * 8), bias = normal(panels * 8);
  for (auto [from, to] : {std::pair<int, int>{0, 19}, {0, 1}, {1, 3}})
    t.matmul(part, 0, panels, a, from, to, {out.data(), panels * 8, bias.data(), false});
  std::vector<float> row(k), same(k);
  for (int64_t r = 0; r < rows; r++) {
    kernels_generic()->dequantize_row(part, k, r, row.data());
    t.dequantize_row(part, k, r, same.data());
    check(all_close(same, row), t.name, "dequantize, type", type);
    for (int i = 0; i < m; i++) {
      double expected = 0, size = 0;
      for (int64_t j = 0; j < k; j++) {
        const double v = type == PG_BF16 ? codes.rounded(x[i * k + j], i * k + j) : is_float(type) ? x[i * k + j] : (double)codes.q[i * k + j] * codes.d[(i * k + j) / 32];
        expected += v * row[j], size += std::abs(v * row[j]);
      }
      check(close(out[i * panels * 8 + r], expected + bias[r], size), t.name, "product, type", type);
    }
  }
}

void test_attention(const Kernels& t, bool int8, int window, bool has_sinks) {
  const int dim = 80, group = 3, tokens = 5, position = 700, length = position + tokens, blocks = (length + 15) / 16;
  KvCache cache = {nullptr, 1, 1, dim, int8};
  cache.block_bytes = cache.own_bytes();
  std::vector<uint8_t> memory(blocks * cache.stride());
  cache.data = memory.data();
  std::vector<int32_t> table(blocks);
  for (int b = 0; b < blocks; b++) table[b] = (b * 7) % blocks == 0 && b ? b : blocks - 1 - b;
  const std::vector<float> keys = normal(length * dim), values = normal(length * dim), q = normal(tokens * group * dim);
  for (int i = 0; i < length; i++)
    t.store_kv(cache, 0, table[i / 16], 0, i % 16, &keys[i * dim], &values[i * dim]);
  std::vector<float> out(q.size()), scratch(attention_scratch(dim));
  const float sinks[group] = {-100.0f, 1.5f, 9.0f};
  t.attention({&cache, table.data(), 0, 0, group, tokens, position, q.data(), group * dim, out.data(), group * dim, 0.125f, window, has_sinks ? sinks : nullptr}, scratch.data());
  for (int n = 0; n < tokens * group; n++) {
    std::vector<double> sum(dim);
    double total = has_sinks ? std::exp((double)sinks[n % group]) : 0.0;
    const int last = position + n / group;
    for (int i = std::max(0, last + 1 - window); i <= last; i++) {
      double score = 0;
      for (int d = 0; d < dim; d++) score += (double)q[n * dim + d] * keys[i * dim + d];
      const double weight = std::exp(score * 0.125);
      total += weight;
      for (int d = 0; d < dim; d++) sum[d] += weight * values[i * dim + d];
    }
    // f16 has 11 bits; 8 bits are half a step of max / 127 away
    for (int d = 0; d < dim; d++)
      check(close(out[n * dim + d], sum[d] / total, 1.0, int8 ? 2e-2 : 2e-3), t.name, "attention, window", window);
  }
}

// Two steps of a request: the state goes on from the first. Where it was cut changes no bit.
void test_delta(const Kernels& t, bool tiled) {
  const int keys = 2, heads = 4, dk = 24, dv = 40, kernel = 4, tokens = 21;
  const int64_t channels = 2 * keys * dk + heads * dv, width = channels + heads * dv + 2 * heads;
  const std::vector<float> in = normal(tokens * width), taps = normal(kernel * channels), norm = normal(dv), dt = normal(heads);
  const std::vector<float> rate = {0.5f, 0.01f, 8.0f, 100.0f};
  const auto run = [&](const Kernels& k, int cut) {
    const int64_t size = delta_state(dk, dv, heads / keys, kernel);
    std::vector<float> states(keys * size), scratch(delta_scratch(dk, dv)), out(tokens * heads * dv);
    for (int head = 0; head < keys; head++)
      for (auto [from, to] : {std::pair<int, int>{0, cut}, {cut, tokens}})
        k.delta({in.data() + from * width, width, out.data() + from * heads * dv, heads * dv, to - from, head, keys, heads, dk, dv, kernel,
                 tiled, taps.data(), channels, rate.data(), dt.data(), norm.data(), 1e-6f, states.data() + head * size}, scratch.data());
    out.insert(out.end(), states.begin(), states.end());
    return out;
  };
  const std::vector<float> found = run(t, 2), expected = run(*kernels_generic(), 2);
  double top = 0;
  for (float v : expected) top = std::max(top, (double)std::abs(v));
  for (size_t i = 0; i < found.size(); i++) check(close(found[i], expected[i], top), t.name, "delta");
  for (int cut : {1, 9, 16}) check(run(t, cut) == found, t.name, "delta, cut", cut);
}

// Against sums in double; where a prompt was cut changes no bit.
void test_scan(const Kernels& t) {
  const int dk = 24, dv = 48, tokens = 37;
  const int64_t stride = 2 * dk + dv + 1;
  const std::vector<float> in = normal(tokens * stride);
  const float rate = 0.3f, dt = 0.5f, skip = 0.7f;
  const auto run = [&](std::vector<int> cuts) {
    std::vector<float> out(tokens * dv), state(dk * dv);
    cuts.push_back(tokens);
    int from = 0;
    for (int to : cuts) {
      const float* q = in.data() + from * stride;
      t.scan({q, q + dk, q + 2 * dk, q + 2 * dk + dv, stride, out.data() + from * dv, dv, to - from, dk, dv, rate, dt, skip, state.data()});
      from = to;
    }
    return out;
  };
  const std::vector<float> found = run({});
  std::vector<double> state(dk * dv);
  for (int n = 0; n < tokens; n++) {
    const float *q = in.data() + n * stride, *k = q + dk, *v = k + dk;
    const double step = std::log1p(std::exp((double)v[dv] + dt)), decay = std::exp(-rate * step);
    for (int j = 0; j < dv; j++) {
      double y = (double)skip * v[j], top = std::abs(y);
      for (int i = 0; i < dk; i++) {
        double& s = state[i * dv + j];
        s = decay * s + k[i] * step * v[j], y += s * q[i], top += std::abs(s * q[i]);
      }
      check(close(found[n * dv + j], y, top), t.name, "scan", n);
    }
  }
  check(run({1, 17, 18, 34}) == found, t.name, "scan, cut");
}

// Across a cut, in place, against sums in double.
void test_convolve(const Kernels& t, int kernel) {
  const int n = 24, tokens = 37, cut = 18;
  const std::vector<float> in = normal(tokens * n), taps = normal(kernel * n), bias = normal(n);
  std::vector<float> x = in, past((kernel - 1) * n);
  for (auto [from, to] : {std::pair<int, int>{0, cut}, {cut, tokens}})
    t.convolve({x.data() + from * n, n, x.data() + from * n, n, to - from, n, kernel, taps.data(), bias.data(), n, past.data(), n});
  for (int at = 0; at < tokens * n; at++) {
    double sum = bias[at % n];
    for (int j = 0; j < kernel; j++)
      if (const int from = at + (j + 1 - kernel) * n; from >= 0) sum += (double)in[from] * taps[j * n + at % n];
    check(close(x[at], sum / (1.0 + std::exp(-sum)), std::abs(sum) + 1.0), t.name, "convolve, kernel", kernel);
  }
}

void test_rows(const Kernels& t) {
  const Kernels& g = *kernels_generic();
  const int64_t n = 1056;
  std::vector<float> x = normal(n, 3.0f), y = normal(n), a(n), b(n);
  x[5] = 0.0f, x[6] = -90.0f;
  t.norm(x.data(), y.data(), n, 1e-5f, a.data()), g.norm(x.data(), y.data(), n, 1e-5f, b.data());
  check(all_close(a, b), t.name, "norm");
  t.silu(x.data(), y.data(), n, a.data()), g.silu(x.data(), y.data(), n, b.data());
  check(all_close(a, b), t.name, "silu");
  for (int64_t m : {n, n - 3}) {
    t.clamped(x.data(), y.data(), m, a.data());
    for (int64_t i = 0; i < m; i++) {
      const double gate = std::min(x[i], 7.0f), up = std::clamp(y[i] * 1.0, -7.0, 7.0);
      check(close(a[i], gate / (1.0 + std::exp(-1.702 * gate)) * (up + 1.0), std::abs(gate * (up + 1.0)) + 1e-6), t.name, "clamped", (int)i);
    }
  }
  a = b = x;
  t.rotate(a.data(), y.data(), y.data() + 100, 64, false), g.rotate(b.data(), y.data(), y.data() + 100, 64, false);
  check(all_close(a, b), t.name, "rotate");
  const Quantized c(t, x), d(g, x);
  check(c.q == d.q, t.name, "codes");
  check(all_close(c.d, d.d) && all_close(c.s, d.s) && c.n == d.n && c.h == d.h, t.name, "scales and sums");
  check(t.row_max(x.data(), n - 3) == g.row_max(x.data(), n - 3), t.name, "row_max");
  const double p = t.exp_row(x.data(), n - 3, 10.0f, 1.5f, a.data()), e = g.exp_row(x.data(), n - 3, 10.0f, 1.5f, b.data());
  check(std::abs(p - e) <= 1e-5 * e, t.name, "sum of exponents");
  for (int64_t i = 0; i < n - 3; i++) {
    const double exact = std::exp((double)((x[i] - 10.0f) * 1.5f));
    check(close(a[i], exact < 1.7e-38 ? 0.0 : exact, exact), t.name, "exponent", (int)i);
  }
  y[n - 1] = NAN;
  check(std::isnan(t.row_max(y.data(), n)), t.name, "row_max of NaN");
}

void test_halves(const Kernels& t) {  // every f16 number, by a panel of them
  std::vector<uint16_t> all(65536);
  for (int i = 0; i < 65536; i++) all[i] = (uint16_t)i;
  const Part part = {PG_F16, 8, 0, 0, 65536 * 2, reinterpret_cast<const uint8_t*>(all.data())};
  for (int r = 0; r < 8; r++) {
    std::vector<float> row(8192);
    t.dequantize_row(part, 8192, r, row.data());
    for (int i = 0; i < 8192; i++) {
      const int h = 8 * i + r, exponent = h >> 10 & 31;
      const double m = exponent ? 1024 + (h & 1023) : h & 1023;
      const double v = std::ldexp(h & 0x8000 ? -m : m, (exponent ? exponent : 1) - 25);
      const bool good = exponent < 31 ? row[i] == v : h & 1023 ? std::isnan(row[i]) : std::isinf(row[i]) && (row[i] < 0) == (h >> 15);
      check(good, t.name, "f16", h);
    }
  }
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 1) check(!strcmp(pg_isa(0), arguments[1]), pg_isa(0), "is not the best expected");
  for (int i = 0; pg_isa(i); i++) {
    pg_context* c = pg_create(2, pg_isa(i));
    const Kernels& t = *c->kernels;
    check(!strcmp(t.name, pg_isa(i)), t.name, "has another name");
    for (int32_t type = 0; type < 64; type++)
      if (is_float(type) || layout_of(type).block) test_product(t, type);
    for (int window : {1 << 20, 600, 20, 1})
      for (bool int8 : {false, true}) test_attention(t, int8, window, false), test_attention(t, int8, window, true);
    test_rows(t), test_halves(t), test_delta(t, false), test_delta(t, true), test_scan(t), test_convolve(t, 4), test_convolve(t, 2);
    std::printf("%s: checked\n", t.name);
    pg_destroy(c);
  }
  return failures != 0;
}
