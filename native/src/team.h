// Threads that work through a job together. A phase of a job ends when all its chunks are done, not when all threads
// have come: a thread whose processor is taken away delays the others by the one chunk it holds, or not at all.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace pagoda {

// A number that changes, and threads that wait for it to: a short spin, then sleep on a futex.
struct alignas(64) Signal {
  std::atomic<uint32_t> word{0};
  std::atomic<int> sleepers{0};
  void wait_while(uint32_t seen);
  void wake();  // after a change of word
};

// Chunks [0, total) that threads take one by one.
class Phase {
 public:
  explicit Phase(int64_t total = 0) : total_(total) {}
  // Body(chunk) for the chunks this thread gets; returns when all chunks of all threads are done.
  template <typename Body> void share(Body body) {
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < total_;) {
      body(i);
      finish_one();
    }
    wait();
  }

 private:
  void finish_one();
  void wait();
  const int64_t total_;
  alignas(64) std::atomic<int64_t> next_{0};
  Signal done_;
};

// `work` is run by every thread that comes while the job is posted, perhaps after the job is over: it may touch what
// the job does not own only inside a chunk.
struct Job {
  virtual ~Job() = default;
  virtual void work(int thread) = 0;
};

class Team {
 public:
  explicit Team(int threads);
  ~Team();
  int size() const { return size_; }
  // Work on the job with all threads, the caller being thread 0; returns when the caller's work does.
  void run(std::shared_ptr<Job> job);

 private:
  void worker(int index);
  const int size_;
  bool stop_ = false;
  std::mutex mutex_;  // guards job_
  std::shared_ptr<Job> job_;
  Signal epoch_;  // changes with every job
  std::vector<std::thread> threads_;
};

}  // namespace pagoda
