// Signals on futexes, and the loop of the team's threads.
#include "team.h"

#include <climits>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace pagoda {
namespace {

constexpr int kSpins = 4000;  // some tens of microseconds: longer than balanced threads are out of step

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

void futex(std::atomic<uint32_t>& word, int operation, uint32_t value) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), operation, value, nullptr, nullptr, 0);
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

void Signal::wake() {
  if (sleepers.load() > 0) futex(word, FUTEX_WAKE_PRIVATE, INT_MAX);
}

void Phase::open() const {
  finished_->changed.word.store(1);
  finished_->changed.wake();
}

Team::Team(int threads) : size_(threads) {
  for (int i = 1; i < threads; i++) threads_.emplace_back([this, i] { worker(i); });
}

Team::~Team() {
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
  }
  epoch_.changed.word.fetch_add(1);
  epoch_.changed.wake();
  for (auto& t : threads_) t.join();
}

void Team::start(std::shared_ptr<Job> job) {
  started_ = job;
  if (size_ > 1) {
    {
      std::lock_guard lock(mutex_);
      job_ = job;
    }
    epoch_.changed.word.fetch_add(1);
    epoch_.changed.wake();
  }
}

void Team::wait() {
  if (const std::shared_ptr<Job> job = std::move(started_)) job->work(0);
}

void Team::worker(int index) {
  for (uint32_t seen = 0;;) {
    epoch_.changed.wait_while(seen);
    seen = epoch_.changed.word.load();
    std::shared_ptr<Job> job;
    {
      std::lock_guard lock(mutex_);
      if (stop_) return;
      job = job_;
    }
    job->work(index);
  }
}

}  // namespace pagoda
