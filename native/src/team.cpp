// The thread team: futex-backed epoch for jobs, futex-backed phase for barriers.
#include "team.h"

#include <climits>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace pagoda {
namespace {

constexpr int kSpins = 4000;  // some tens of microseconds: longer than a balanced phase lasts out of step

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

long futex(std::atomic<uint32_t>& word, int operation, uint32_t value) {
  return syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), operation, value, nullptr, nullptr, 0);
}


}  // namespace

void Signal::wait_while(uint32_t seen) {
  for (int i = 0; i < kSpins; i++) {
    if (word.load(std::memory_order_acquire) != seen) return;
    relax();
  }
  sleepers.fetch_add(1);
  while (word.load() == seen) futex(word, FUTEX_WAIT_PRIVATE, seen);
  sleepers.fetch_sub(1);
}

void Signal::advance() {
  word.fetch_add(1);
  if (sleepers.load() > 0) futex(word, FUTEX_WAKE_PRIVATE, INT_MAX);
}

Team::Team(int threads) : size_(threads) {
  for (int i = 1; i < threads; i++) threads_.emplace_back([this, i] { worker(i); });
}

Team::~Team() {
  stop_ = true;
  epoch_.advance();
  for (auto& t : threads_) t.join();
}

void Team::run(const std::function<void(int)>& job) {
  if (size_ == 1) return job(0);
  job_ = &job;
  epoch_.advance();
  job(0);
  barrier();
}

void Team::barrier() {
  if (size_ == 1) return;
  uint32_t phase = phase_.word.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    phase_.advance();
  } else {
    phase_.wait_while(phase);
  }
}

void Team::worker(int index) {
  uint32_t seen = 0;
  for (;;) {
    epoch_.wait_while(seen);
    seen++;
    if (stop_) return;
    (*job_)(index);
    barrier();
  }
}

}  // namespace pagoda
