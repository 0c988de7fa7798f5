// A team of threads that run one function together: barriers that spin shortly and then sleep, chunks that are stolen.
#pragma once
#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

namespace pagoda {

// A number that only goes up, and threads that wait for it to change: a short spin, then sleep on a futex.
struct alignas(64) Signal {
  std::atomic<uint32_t> word{0};
  std::atomic<int> sleepers{0};
  void wait_while(uint32_t seen);
  void advance();
};

class Team {
 public:
  explicit Team(int threads);
  ~Team();
  int size() const { return size_; }
  // Run job(thread index) on every thread, the caller being thread 0; returns when all are done.
  void run(const std::function<void(int)>& job);
  // Wait until every thread of the running job has come here.
  void barrier();

 private:
  void worker(int index);
  int size_;
  std::vector<std::thread> threads_;
  const std::function<void(int)>* job_ = nullptr;
  bool stop_ = false;
  Signal epoch_;  // changes when a job starts
  Signal phase_;  // changes when a barrier opens
  alignas(64) std::atomic<int> arrived_{0};
};

// A counter on a cache line of its own: threads take chunks of a phase from it.
struct alignas(64) Counter {
  std::atomic<int64_t> next{0};
};

}  // namespace pagoda
