// The forward chain q(x_{1:T} | x_0) (fastdiff/ops/chain.py): a thread keeps its elements in
// registers through all T steps, so x_0 is read once and only the wanted steps are written.
#pragma once

#include "step.cuh"

namespace fastdiff {

constexpr int64_t kChainStream = 4;  // STREAM_CHAIN of fastdiff/noise.py

// T: the type of x_start and out, to which x and seeded noise are rounded at every step.
template <class T>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    chain_kernel(const __grid_constant__ ChainParams p, bool aligned) {
  using L = Layout<8, false>;
  const int64_t plane = p.batch * p.n;
  const float* const table = static_cast<const float*>(p.table);
  for (int64_t b = first_sample(); b < p.batch; b += sample_stride()) {
    const NoiseKey key = noise_key(p.keys, p.seed, p.sample_offset, b);
    const int64_t offset = b * p.n;
    for (int64_t e = first_element<L>(); e < p.n; e += element_stride<L>()) {
      const Chunk chunk{e, p.n, aligned && e + L::kReach <= p.n};
      float x[L::kWidth];
      load<L>(static_cast<const T*>(p.x_start.data) + offset, chunk, x);
      for (int64_t t = 0; t < p.steps; ++t) {
        const float a = __ldg(table + 2 * t), s = __ldg(table + 2 * t + 1);
        FD_UNROLL
        for (int k = 0; k < L::kWidth; ++k) x[k] = a != 0.0f ? a * x[k] : kNegativeZero;
        if (s != 0.0f) {
          float z[L::kWidth];
          if (p.noise.data) {
            load_operand<AnyType, L>(p.noise, t * plane + offset, chunk, z);
          } else {
            const Draw draw = make_draw(key, t, kChainStream);
            FD_UNROLL
            for (int g = 0; g < L::kGroups; ++g) {
              const uint32_t block = static_cast<uint32_t>(e / 4 + g);
              if (p.fast) {
                normal_block<true>(draw, block, z + 4 * g);
              } else {
                normal_block<false>(draw, block, z + 4 * g);
              }
            }
            round_values<T>(DType::f32, z, L::kGroups);
          }
          accumulate<true>(x, s, z);
        }
        round_values<T>(DType::f32, x, L::kGroups);
        const int64_t slot = __ldg(p.slots + t);
        if (slot >= 0) store<L>(static_cast<T*>(p.out.data) + slot * plane + offset, chunk, x);
      }
    }
  }
}

}  // namespace fastdiff
