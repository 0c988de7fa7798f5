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
struct Signal {
  std::atomic<uint32_t> word{0};
  std::atomic<int> sleepers{0};
  void wait_while(uint32_t seen);
  void wake();  // after a change of word
};

struct alignas(64) Counter {  // has a line of the cache for itself
  std::atomic<int64_t> count{0};
  Signal changed;
};

// Counters of many phases, in few pieces of memory.
class CounterPool {
 public:
  Counter* take(int n) {
    if (n > left_) pieces_.emplace_back(new Counter[left_ = kPiece]);
    return &pieces_.back()[left_ -= n];
  }

 private:
  static constexpr int kPiece = 512;
  std::vector<std::unique_ptr<Counter[]>> pieces_;
  int left_ = 0;
};

// Chunks [0, total), at least one. Each thread begins in a stretch of its own, so that what it reads lies in a row,
// and then helps the others.
class Phase {
 public:
  Phase(int64_t total, int threads, CounterPool& pool)
      : total_(total), lanes_(threads < kLanes ? threads : kLanes), next_(pool.take(lanes_ + 1)), finished_(next_ + lanes_) {}
  bool done() const { return finished_->changed.word.load(std::memory_order_acquire) != 0; }
  // Body(chunk) for the chunks this thread gets; the thread that finishes the last one calls `after`. Returns when all
  // of it is done.
  template <typename Body, typename After> void share(int thread, Body body, After after) const {
    for (int n = 0; n < lanes_; n++) {
      const int lane = (thread + n) % lanes_;
      const int64_t begin = total_ * lane / lanes_, end = total_ * (lane + 1) / lanes_;
      for (int64_t i; (i = begin + next_[lane].count.fetch_add(1, std::memory_order_relaxed)) < end;) {
        body(i);
        if (finished_->count.fetch_add(1, std::memory_order_acq_rel) + 1 == total_) {
          after();
          open();
        }
      }
    }
    finished_->changed.wait_while(0);
  }

 private:
  static constexpr int kLanes = 8;
  void open() const;
  int64_t total_;
  int lanes_;
  Counter *next_, *finished_;
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
  // The other threads begin; the caller, who is thread 0, comes with `wait`, which returns when all of it is done.
  void start(std::shared_ptr<Job> job);
  void wait();
  void run(std::shared_ptr<Job> job) { start(std::move(job)), wait(); }

 private:
  void worker(int index);
  const int size_;
  bool stop_ = false;
  std::mutex mutex_;  // guards job_
  std::shared_ptr<Job> job_;
  std::shared_ptr<Job> started_;  // by the caller, who has not waited for it yet
  Counter epoch_;  // its word changes with every job
  std::vector<std::thread> threads_;
};

}  // namespace pagoda
