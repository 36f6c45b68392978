// What one ISA level offers to dispatch.cpp: each operation over a range of blocks. A block is
// kBlock consecutive elements of one sample (the last one of a sample may be shorter); blocks are
// numbered through all samples and may run in any order on any thread with the same result.
#pragma once

#include "../include/params.h"

namespace fastdiff {

constexpr int kBlock = 1024;

FD_HD int64_t blocks_per_sample(int64_t n) { return (n + kBlock - 1) / kBlock; }

// Results from this size on would not stay in the last-level cache (dispatch.cpp).
int64_t streamed_bytes();

struct Kernels {
  const char* isa;
  void (*randn)(const RandnParams& params, int64_t first, int64_t last);
  void (*step)(const StepParams& params, int64_t first, int64_t last);
  void (*chain)(const ChainParams& params, int64_t first, int64_t last);
  void (*loss)(const LossParams& params, int64_t first, int64_t last);
  void (*loss_results)(const LossParams& params);  // after loss of all blocks
  void (*loss_grad)(const LossParams& params, int64_t first, int64_t last);
  void (*bits)(const BitsParams& params, int64_t first, int64_t last);
  void (*bits_bound)(const BitsBoundParams& params, int64_t first, int64_t last);
  void (*bits_bound_sum)(const BitsBoundParams& params, int64_t first, int64_t last);  // samples
  void (*bits_bound_grad)(const BitsBoundParams& params, int64_t first, int64_t last);
  // Pairs of words to pairs of normals; for tests of the edge cases that no counter reaches.
  void (*box_muller)(const uint32_t* a, const uint32_t* b, float* z0, float* z1, int64_t n);
};

}  // namespace fastdiff
