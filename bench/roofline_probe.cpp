// What this machine can do at most: memory read, and products of 8-bit integers, with all threads. Prints JSON.
// Build: c++ -O2 -march=native -pthread roofline_probe.cpp; argument: threads.
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512VNNI__)
#define KEPT(x) "+v"(x)  // in a register, its value unknown to the compiler
#elif defined(__x86_64__)
#define KEPT(x) "+x"(x)
#else
#define KEPT(x) "+w"(x)
#endif

namespace {

template <typename Body> double best_seconds(int threads, int rounds, Body body) {
  double best = 1e9;
  for (int round = 0; round < rounds; round++) {
    const auto start = std::chrono::steady_clock::now();
    std::vector<std::thread> others;
    for (int i = 1; i < threads; i++) others.emplace_back(body, i);
    body(0);
    for (auto& t : others) t.join();
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return best;
}

typedef uint64_t Line __attribute__((vector_size(64)));

double read_bytes_per_s(int threads) {
  constexpr size_t bytes = 512u << 20;
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return 0;
  madvise(memory, bytes, MADV_HUGEPAGE);
  memset(memory, 1, bytes);
  const Line* lines = static_cast<const Line*>(memory);
  const size_t count = bytes / sizeof(Line);
  const double seconds = best_seconds(threads, 7, [&](int thread) {
    Line sum[4] = {};
    for (size_t i = count * thread / threads; i + 4 <= count * (thread + 1) / threads; i += 4)
      for (int j = 0; j < 4; j++) sum[j] += lines[i + j];
    asm volatile("" : : "m"(sum) : "memory");
  });
  return bytes / seconds;
}

constexpr int kChains = 10;
#if defined(__AVX512VNNI__)
constexpr int kMacs = 64;
#define STEP(x) x = _mm512_dpbusd_epi32(x, a, a);
typedef __m512i Vector;
#elif defined(__AVX2__)
constexpr int kMacs = 32;
#define STEP(x) x = _mm256_madd_epi16(_mm256_maddubs_epi16(x, a), a);  // the sum would go to other units
typedef __m256i Vector;
#elif defined(__ARM_FEATURE_DOTPROD)
constexpr int kMacs = 16;
#define STEP(x) x = vdotq_s32(x, (int8x16_t)a, (int8x16_t)a);
typedef int32x4_t Vector;
#else
constexpr int kMacs = 4;
#define STEP(x) x += a * a;
typedef int32_t Vector __attribute__((vector_size(16)));
#endif

double macs_per_s(int threads) {
  constexpr long rounds = 20000000;
  const double seconds = best_seconds(threads, 5, [](int) {
    Vector a = {}, c0 = {}, c1 = {}, c2 = {}, c3 = {}, c4 = {}, c5 = {}, c6 = {}, c7 = {}, c8 = {}, c9 = {};
    for (long i = 0; i < rounds; i++) {
      STEP(c0) STEP(c1) STEP(c2) STEP(c3) STEP(c4) STEP(c5) STEP(c6) STEP(c7) STEP(c8) STEP(c9)
      asm volatile("" : KEPT(a), KEPT(c0), KEPT(c1), KEPT(c2), KEPT(c3), KEPT(c4));
      asm volatile("" : KEPT(c5), KEPT(c6), KEPT(c7), KEPT(c8), KEPT(c9));
    }
  });
  return (double)rounds * kChains * kMacs * threads / seconds;
}

}  // namespace

int main(int count, char** arguments) {
  const int threads = count > 1 ? std::atoi(arguments[1]) : (int)std::thread::hardware_concurrency();
  std::printf("{\"threads\": %d, \"read_gb_s\": %.2f, \"int8_gmac_s\": %.1f}\n", threads, read_bytes_per_s(threads) / 1e9,
              macs_per_s(threads) / 1e9);
}
