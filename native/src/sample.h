// From a row of logits to a token: penalties, biases, masks, temperature, top-k, top-p, min-p, log-probabilities.
#pragma once
#include <utility>
#include <vector>

#include "kernels.h"
#include "pagoda.h"

namespace pagoda {

struct SampleScratch {
  std::vector<float> raw, weights;
  std::vector<std::pair<float, int32_t>> candidates;
  std::vector<float> block_tops;
};

// Fill the step's results for row l from its logits (which are overwritten).
void sample_row(const Kernels&, const pg_step&, int l, float* logits, int64_t vocab, SampleScratch&);

// One draw in [0, 1) of Philox4x32-10 (Salmon et al., SC 2011), with counter (position, 0, 0, 0).
float philox_uniform(uint64_t seed, uint32_t position);

}  // namespace pagoda
