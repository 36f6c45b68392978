// Noise on the GPU: one Philox block of four normals at a time, and the kernel that stores them.
#pragma once

#include "../include/noise.h"
#include "launch.cuh"
#include "memory.cuh"

namespace fastdiff {

// One draw of one sample: its seed, and what the first two rounds of Philox need. Of the counter
// only the block differs from element to element, so half of those rounds is done here, once.
struct Draw {
  uint32_t seed_low, seed_high;
  uint32_t in_word2, in_word0, in_word2_next, word3;

  static __device__ __forceinline__ Draw of(const NoiseKey& key, uint32_t step, uint32_t stream) {
    Draw draw;
    draw.seed_low = key.seed_low;
    draw.seed_high = key.seed_high;
    uint32_t high, low;
    Scalar::mulhilo(step, kMultiplier1, high, low);
    const uint32_t word0 = high ^ key.sample ^ key.seed_low;
    draw.in_word2 = stream ^ key.seed_high;
    draw.in_word0 = low ^ (key.seed_low + kWeyl0);
    Scalar::mulhilo(word0, kMultiplier0, high, draw.word3);
    draw.in_word2_next = high ^ (key.seed_high + kWeyl1);
    return draw;
  }

  __device__ __forceinline__ void words(uint32_t block, uint32_t (&c)[4]) const {
    uint32_t high, low;
    Scalar::mulhilo(block, kMultiplier0, high, low);
    c[2] = low ^ in_word2_next;
    Scalar::mulhilo(high ^ in_word2, kMultiplier1, high, low);
    c[0] = high ^ in_word0;
    c[1] = low;
    c[3] = word3;
    FD_UNROLL
    for (uint32_t round = 2; round < kRounds; ++round) {
      philox_round<Scalar>(c, seed_low + round * kWeyl0, seed_high + round * kWeyl1);
    }
  }
};

#if defined(__CUDA_ARCH__)
// The special function unit. Denormals are flushed (.ftz), which changes nothing where these are
// used and saves rescaling.
__device__ __forceinline__ float approximate_log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float approximate_sqrt(float x) {
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float approximate_sin(float x) {
  float y;
  asm("sin.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float approximate_cos(float x) {
  float y;
  asm("cos.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#endif

// noise="fast": the words and the mapping of box_muller<Scalar>, with the functions above; within
// 4e-4 of it. Near u = 1 the documented error of the logarithm, 2^-22, would move the root by more
// than that: -2 ln u is at least 2 - 2 u, and at u = 1, as at any power of two, the logarithm is
// taken to be exact (tests/fast_noise_check.cpp has the errors). Both multiply-adds round once,
// which is what multiplying by a power of two first does too.
__device__ __forceinline__ void box_muller_fast(uint32_t a, uint32_t b, float& z0, float& z1) {
#if defined(__CUDA_ARCH__) || defined(FASTDIFF_MODEL_FAST)
  const float word = static_cast<float>(static_cast<int32_t>(a >> 1));
  const float u = __fmaf_rn(word, 0x1p-31f, 0x1p-32f);
  const float least = __fmaf_rn(u, -2.0f, 2.0f);
  const float r = approximate_sqrt(fmaxf(approximate_log2(u) * -0x1.62e430p+0f, least));
  const float phi = static_cast<float>(static_cast<int32_t>(b << 2)) * 0x1.921fb6p-32f;  // pi/4 y
  const float s = approximate_sin(phi);
  const float c = bit_cast<float>(bit_cast<uint32_t>(approximate_cos(phi)) ^ (b & 0x80000000u));
  const bool swap = hidden(b & 0x40000000u) != 0;
  z0 = (swap ? s : c) * r;
  z1 = (swap ? c : s) * r;
#else
  box_muller<Scalar>(a, b, z0, z1);  // on the CPU fast means exact
#endif
}

// In uniform registers, with the ten round keys that follow from the seed.
__device__ __forceinline__ Draw uniform(const Draw& draw) {
  return {uniform(draw.seed_low), uniform(draw.seed_high),     uniform(draw.in_word2),
          uniform(draw.in_word0), uniform(draw.in_word2_next), uniform(draw.word3)};
}

template <bool kFast>
__device__ __forceinline__ void normal_block(const Draw& draw, uint32_t block, float* z) {
  uint32_t words[4];
  draw.words(block, words);
  if constexpr (kFast) {
    box_muller_fast(words[0], words[1], z[0], z[1]);
    box_muller_fast(words[2], words[3], z[2], z[3]);
  } else {
    box_muller<Scalar>(words[0], words[1], z[0], z[1]);
    box_muller<Scalar>(words[2], words[3], z[2], z[3]);
  }
}

__device__ __forceinline__ void normal_block(bool fast, const Draw& draw, uint32_t block,
                                             float* z) {
  if (fast) {
    normal_block<true>(draw, block, z);
  } else {
    normal_block<false>(draw, block, z);
  }
}

// Eight exact normals take up to 40 registers.
template <bool kFast>
constexpr int kRandnBlocks = !kFast && kResidentBlocks > 6 ? 6 : kResidentBlocks;

template <class L, class T, bool kFast>
__global__ void __launch_bounds__(kThreads, kRandnBlocks<kFast>)
    randn_kernel(const __grid_constant__ RandnParams p, bool aligned) {
  const uint32_t b = sample_index();
  if (b >= p.batch) return;
  const NoiseKey key = noise_key(p.keys, p.seed, p.sample_offset, b);
  const Draw draw =
      uniform(Draw::of(key, static_cast<uint32_t>(p.step), static_cast<uint32_t>(p.stream)));
  T* const out = static_cast<T*>(p.out.data) + b * p.n;
  for_each_block<L>(p.n, [&](uint32_t block, uint32_t) {
    float z[L::kWidth];  // those past the end are made too, and not stored
    FD_UNROLL
    for (int g = 0; g < L::kGroups; ++g) {
      const uint32_t counter = static_cast<uint32_t>(p.first_block) + block;
      normal_block<kFast>(draw, counter + g * L::kStride, z + 4 * g);
    }
    const int64_t left = p.n - static_cast<int64_t>(block) * 4;
    if (aligned && left >= L::kReach) {
      store<L>(out, Chunk{block, left, true}, z);
      return;
    }
    FD_UNROLL
    for (int g = 0; g < L::kGroups; ++g) {
      const int64_t rest = left - 4 * g * L::kStride;
      if (rest <= 0) return;
      const float group[4] = {z[4 * g], z[4 * g + 1], z[4 * g + 2], z[4 * g + 3]};
      const Chunk chunk{block + g * L::kStride, rest, aligned && rest >= 4};
      store<Layout<4, false>>(out, chunk, group);
    }
  });
}

}  // namespace fastdiff
