// What a loaded model is: repacked weights, buffers, the KV cache, the program, the team that runs it.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "kernels.h"
#include "sample.h"
#include "team.h"

namespace pagoda {

// Zeroed pages straight from the system, taken as they are touched.
class Pages {
 public:
  Pages() = default;
  explicit Pages(int64_t bytes, bool huge = false);
  Pages(Pages&& other) noexcept : data_(other.data_), bytes_(other.bytes_) { other.data_ = nullptr; }
  Pages& operator=(Pages&& other) noexcept { std::swap(data_, other.data_), std::swap(bytes_, other.bytes_); return *this; }
  ~Pages();
  uint8_t* data() const { return data_; }
  int64_t bytes() const { return bytes_; }
  bool touch(int64_t from, int64_t to) const;  // take these bytes from the system now; false where it cannot
  void release() const;  // until they are touched again; they are zero then

 private:
  uint8_t* data_ = nullptr;
  int64_t bytes_ = 0;
};

// Memory for repacked weights, one behind the other in huge pages: streams that cross fewer page borders are faster.
class Arena {
 public:
  uint8_t* take(int64_t bytes);
  int64_t used() const { return used_; }

 private:
  std::vector<Pages> pages_;
  int64_t free_ = 0, used_ = 0;  // bytes left at the end of the last pages; bytes given out
};

struct Weight {
  std::vector<Part> parts;
  int64_t rows = 0, k = 0, panels = 0;
};

struct LowRank {  // of an adapter, for one of the matrices that a weight is stacked of
  Part down, up;
  int64_t rank, before;  // before: ranks of the pairs in front of it
};

struct Adapter {
  Pages pages;
  std::vector<std::vector<LowRank>> of_weight;  // by the weight's id
  int64_t ranks = 0;  // most of one weight together
};

struct Buffer {  // [rows][width] floats, and the other forms of the same rows that products read
  int64_t width;
  int64_t rows;  // as many as it has, after which it begins anew: of a piece
  Pages f, q, d, s, n, h, wide, bf16;  // f is empty where only other forms are read
  float* row(int64_t r) const { return reinterpret_cast<float*>(f.data()) + r % rows * width; }
  Codes codes(int64_t r) const { return codes_at(r % rows * width); }
  Codes codes_at(int64_t value) const {  // of the block that begins with a value
    uint16_t* rounded = bf16.data() ? reinterpret_cast<uint16_t*>(bf16.data()) + value : nullptr;
    if (!q.data()) return {nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, rounded};
    return {reinterpret_cast<int8_t*>(q.data()) + value, reinterpret_cast<float*>(d.data()) + value / kBlock,
            reinterpret_cast<float*>(s.data()) + value / kBlock, reinterpret_cast<int32_t*>(n.data()) + value / kBlock,
            reinterpret_cast<int32_t*>(h.data()) + value / kBlock * 2,
            wide.data() ? reinterpret_cast<int16_t*>(wide.data()) + value : nullptr, rounded};
  }
};

inline void make_forms(const Kernels& k, const float* x, int64_t n, const Codes& to) {
  if (to.q) k.quantize(x, n, to);
  if (to.bf16) k.to_bf16(x, n, to.bf16);
}

struct Heads {  // of attention in layers of a kind, and their part of the cache
  KvCache kv{};
  int jobs = 1;  // that attention is cut into along its heads: each of one KV head, and of no more heads than a job takes
  int rope_dim = 0;
};

}  // namespace pagoda

struct pg_context {
  pg_context(int threads, const pagoda::Kernels* k) : team(threads), kernels(k), scratch(threads), row_scratch(threads), row_values(threads) {}
  pagoda::Team team;
  const pagoda::Kernels* kernels;
  std::string error;
  pagoda::Arena arena;
  std::vector<pagoda::Weight> weights;
  std::vector<std::vector<float>> vectors;
  std::vector<pagoda::Adapter> adapters;  // by place
  std::vector<std::vector<int32_t>> orders;
  std::vector<pagoda::Buffer> buffers;
  std::vector<pg_op> ops;
  pg_dims dims{};
  std::vector<double> inv_freq, local_inv_freq;
  std::vector<int32_t> rope_axes;
  pagoda::Pages kv_pages, rope_pages, logit_pages;
  pagoda::Heads heads, local_heads;
  const pagoda::Heads& heads_of(const pg_op& op) const { return op.flags & PG_LOCAL && dims.local.head_dim ? local_heads : heads; }
  int64_t kv_used = 0, kv_touched = 0;  // bytes of the cache: up to the last block of any step, and taken from the system
  int64_t used_bytes(const pg_step& st) const;  // of the cache, up to the last block that a step writes
  pagoda::Pages state_pages;  // [slot][layer with a state], of layer_state floats each
  std::vector<int32_t> writers;  // of each block of the cache, -1 between steps: see step.cpp
  std::vector<pagoda::SampleScratch> scratch;
  std::shared_ptr<pagoda::Job> begun;  // a step that is run in parts
  std::vector<std::vector<float>> row_scratch;  // for attention, and for a row that is put in order
  std::vector<std::vector<float>> row_values;   // of a buffer that has only the 8-bit form
};
