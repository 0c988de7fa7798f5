// Kernels for AVX-512 with BF16: products of bf16 weights, attention in pairs of bf16, the rest as for AVX-512.
#define PG_NS bf16
#define PG_AVX2
#define PG_VNNI
#define PG_PAIRS
#include "attend_all.h"
#include "attention.h"
#include "bf16.h"

namespace pagoda {

const Kernels* kernels_bf16() {
  static const Kernels table = [] {
    Kernels t = *kernels_avx512();
    t.name = "avx512-bf16", t.matmul = bf16::matmul, t.to_bf16 = bf16::to_bf16;
    t.store_kv = [](const KvCache& cache, int layer, int64_t block, int head, int offset, const float* k, const float* v) {
      const auto store = cache.kind == PG_KV_BF16 ? bf16::store_kv : kernels_avx512()->store_kv;
      store(cache, layer, block, head, offset, k, v);
    };
    t.attention = [](const AttentionJob& job, float* scratch) {
      (job.cache->kind == PG_KV_BF16 ? bf16::attention : kernels_avx512()->attention)(job, scratch);
    };
    t.attention_segment = [](const AttentionJob& job, int index, float* partials, float* scratch) {
      const auto segment = job.cache->kind == PG_KV_BF16 ? bf16::attention_segment : kernels_avx512()->attention_segment;
      segment(job, index, partials, scratch);
    };
    t.attend_all = [](const EncoderJob& job, float* scratch) { (job.bf16 ? bf16::attend_all : kernels_avx512()->attend_all)(job, scratch); };
    return t;
  }();
  return &table;
}

}  // namespace pagoda
