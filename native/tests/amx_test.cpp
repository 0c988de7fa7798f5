// The AMX products against those of the table "avx512", bit for bit: with the tile instructions in plain arithmetic, and
// by the processor's own where it has them. The library is asked for the tables.
#include "tiles.h"

#define PG_NS amx
#define PG_AVX2
#define PG_VNNI
#include "amx.h"
#include "context.h"
#include "same_product.h"
#include "samples.h"

using namespace pagoda;

namespace {

const Kernels* table(const char* isa) {
  pg_context* c = pg_create(1, isa);
  return c ? c->kernels : nullptr;
}

struct Range {
  int64_t from, to;
};

// Rows and panels of a product that adds to what is there, with a bias.
std::vector<float> product(const Kernels& t, const Part& part, const Rows& a, Range rows, Range panels, const std::vector<float>& start) {
  constexpr int64_t width = 40;
  static const std::vector<float> bias = normal(width);
  std::vector<float> out = start;
  t.matmul(part, panels.from, panels.to, a, rows.from, rows.to, {out.data(), width, bias.data(), true});
  return out;
}

int check(const Kernels& base, const Kernels& t, int32_t type) {
  const int64_t k = 1280, outputs = 38, rows = 530;  // 40 blocks: several passes; the last panel is not whole
  const std::vector<uint8_t> w = random_panels(type, 6, k);
  const Part part = {type, outputs, 0, 0, panel_bytes(type, k), w.data()};
  const std::vector<float> x = normal(rows * k), start = normal(rows * 40);
  const Quantized codes(base, x);
  const Rows a = codes.rows(x, k);
  int failures = 0;
  for (Range r : {Range{0, 16}, {3, 20}, {0, 31}, {5, 37}, {0, 15}, {1, 2}, {2, 530}})
    for (Range p : {Range{0, 5}, {2, 3}}) {
      const std::vector<float> seen = product(t, part, a, r, p, start), expected = product(base, part, a, r, p, start);
      bool good = memcmp(seen.data(), expected.data(), seen.size() * 4) == 0 && seen != start;
      for (float v : seen) good = good && std::isfinite(v);
      if (!good) std::printf("FAILED: %s, type %d, rows %d to %d\n", t.name, type, (int)r.from, (int)r.to), failures++;
    }
  return failures;
}

int check_all(const Kernels& base, const Kernels& t) {
  int failures = 0, types = 0;
  for (int32_t type = 0; type < 128; type++)
    if (is_float(type) || layout_of(type).block) failures += check(base, t, type), types++;
  std::printf("%s: %d types checked\n", t.name, types);
  return failures;
}

}  // namespace

namespace pagoda {
const Kernels* kernels_avx512() {
  static const Kernels* found = table("avx512");
  return found;
}
const Kernels* kernels_bf16() { return kernels_avx512(); }
}  // namespace pagoda

int main() {
  const Kernels* base = kernels_avx512();
  if (!base) return std::printf("this processor has no AVX-512 with VNNI\n"), 77;
  Kernels tiles = *base;
  tiles.name = "emulated amx", tiles.matmul = amx::matmul;
  int failures = check_all(*base, tiles);
  if (!same_product(tiles, *base)) std::printf("FAILED: refused at the start\n"), failures++;
  emulated::unit.broken = true;
  if (same_product(tiles, *base)) std::printf("FAILED: taken, though it computes wrong\n"), failures++;
  if (const Kernels* real = table("amx")) failures += check_all(*base, *real);
  return failures != 0;
}
