// Noise on the GPU: one Philox block of four normals at a time, and the kernel that stores them.
#pragma once

#include "../include/noise.h"
#include "launch.cuh"
#include "memory.cuh"

namespace fastdiff {

// Where the noise of one sample comes from: everything of key and counter but the block.
struct Draw {
  int64_t seed, sample_offset;  // by value, for a whole launch
  const int64_t* keys;          // or (seed, sample) of every sample
  uint32_t b, step, stream;
};

// The words of one block. A seed that came by value is the same for every thread: the compiler
// keeps its 20 round keys in uniform registers. Seeds in device memory are loaded at every use
// (from L1), since held, with the round keys they lead to, they would take more registers than
// there are.
__device__ __forceinline__ void random_words(const Draw& draw, uint32_t block,
                                             uint32_t (&words)[4]) {
  words[0] = block;
  words[2] = draw.step;
  words[3] = draw.stream;
  if (draw.keys) {
    const NoiseKey key = noise_key(draw.keys, draw.seed, draw.sample_offset, hidden(draw.b));
    words[1] = key.sample;
    philox4x32<Scalar>(words, key.seed_low, key.seed_high);
  } else {
    const NoiseKey key = noise_key(nullptr, draw.seed, draw.sample_offset, draw.b);
    words[1] = key.sample;
    philox4x32<Scalar>(words, key.seed_low, key.seed_high);
  }
}

#if defined(__CUDA_ARCH__)
// noise="fast": the words and the mapping of box_muller<Scalar>, with the hardware's logarithm,
// root, sine and cosine. u is never denormal, so flushing (.ftz) changes nothing and saves the
// rescaling around lg2; the one multiply-add below is exact, 2^-31 being a power of two.
__device__ __forceinline__ void box_muller_fast(uint32_t a, uint32_t b, float& z0, float& z1) {
  const float u = __fmaf_rn(static_cast<float>(static_cast<int32_t>(a >> 1)), 0x1p-31f, 0x1p-32f);
  const float phi = static_cast<float>(static_cast<int32_t>(b << 2)) * 0x1.921fb6p-32f;  // pi/4 y
  float r, s, c;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(u));
  // The absolute value costs nothing and keeps an error of the logarithm at u = 1 from being NaN.
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(fabsf(r * -0x1.62e430p+0f)));
  asm("sin.approx.ftz.f32 %0, %1;" : "=f"(s) : "f"(phi));
  asm("cos.approx.ftz.f32 %0, %1;" : "=f"(c) : "f"(phi));
  c = __uint_as_float(__float_as_uint(c) ^ (b & 0x80000000u));
  const bool swap = static_cast<int32_t>(b << 1) < 0;
  z0 = (swap ? s : c) * r;
  z1 = (swap ? c : s) * r;
}
#else
__device__ __forceinline__ void box_muller_fast(uint32_t a, uint32_t b, float& z0, float& z1) {
  box_muller<Scalar>(a, b, z0, z1);  // on the CPU fast means exact
}
#endif

template <bool kFast>
__device__ __forceinline__ void normal_block(const Draw& draw, uint32_t block, float* z) {
  uint32_t words[4];
  random_words(draw, block, words);
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

template <class L, class T, bool kFast>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    randn_kernel(const __grid_constant__ RandnParams p, bool aligned) {
  const uint32_t b = sample_index();
  if (b >= p.batch) return;
  const Draw draw{p.seed,
                  p.sample_offset,
                  p.keys,
                  b,
                  static_cast<uint32_t>(p.step),
                  static_cast<uint32_t>(p.stream)};
  T* const out = static_cast<T*>(p.out.data) + b * p.n;
  for_each_chunk<L>(p.n, aligned, [&](auto layout, const Chunk& chunk) {
    using Part = decltype(layout);
    float z[Part::kWidth];
    FD_UNROLL
    for (int g = 0; g < Part::kGroups; ++g) {
      const uint32_t counter = static_cast<uint32_t>(p.first_block) + chunk.block;
      normal_block<kFast>(draw, counter + g * Part::kStride, z + 4 * g);
    }
    store<Part>(out, chunk, z);
  });
}

}  // namespace fastdiff
