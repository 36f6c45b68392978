// The forward chain q(x_{1:T} | x_0) (fastdiff/ops/chain.py): a thread keeps its elements in
// registers through all T steps, so x_0 is read once and only the wanted steps are written.
#pragma once

#include "step.cuh"

namespace fastdiff {

constexpr uint32_t kChainStream = 4;  // STREAM_CHAIN of fastdiff/noise.py

// T: the type of x_start and out, to which x and seeded noise are rounded at every step.
template <class T>
__global__ void __launch_bounds__(kThreads, kResidentBlocksGeneral)
    chain_kernel(const __grid_constant__ ChainParams p, bool aligned) {
  using L = Layout<8, false>;
  const uint32_t b = sample_index();
  if (b >= p.batch) return;
  const int64_t plane = p.batch * p.n, offset = b * p.n;
  const float* const table = static_cast<const float*>(p.table);
  const NoiseKey key = noise_key(p.keys, p.seed, p.sample_offset, b);
  for_each_chunk<L>(p.n, aligned, [&](auto layout, const Chunk& chunk) {
    using Part = decltype(layout);
    float x[Part::kWidth];
    load<Part>(static_cast<const T*>(p.x_start.data) + offset, chunk, x);
    FD_NO_UNROLL
    for (int64_t t = 0; t < p.steps; ++t) {
      const float a = __ldg(table + 2 * t), s = __ldg(table + 2 * t + 1);
      FD_UNROLL
      for (int k = 0; k < Part::kWidth; ++k) x[k] = a != 0.0f ? a * x[k] : kNegativeZero;
      if (s != 0.0f) {
        float z[Part::kWidth];
        if (p.noise.data) {
          load_operand<Part>(p.noise, t * plane + offset, chunk, z);
        } else {
          const Draw draw = Draw::of(key, static_cast<uint32_t>(t), kChainStream);
          FD_UNROLL
          for (int g = 0; g < Part::kGroups; ++g) {
            normal_block(p.fast, draw, chunk.block + g, z + 4 * g);
            round_group<T>(z + 4 * g);
          }
        }
        accumulate(x, s, z);
      }
      FD_UNROLL
      for (int g = 0; g < Part::kGroups; ++g) round_group<T>(x + 4 * g);
      const int64_t slot = __ldg(p.slots + t);
      if (slot >= 0) store<Part>(static_cast<T*>(p.out.data) + slot * plane + offset, chunk, x);
    }
  });
}

}  // namespace fastdiff
