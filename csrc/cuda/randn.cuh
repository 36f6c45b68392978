// Noise on the GPU: one Philox block of four normals at a time, and the kernel that stores them.
#pragma once

#include "../include/noise.h"
#include "launch.cuh"
#include "memory.cuh"

namespace fastdiff {

// Everything of the counter but the block.
struct Draw {
  uint32_t seed_low, seed_high, sample, step, stream;
};

__device__ __forceinline__ Draw make_draw(const NoiseKey& key, int64_t step, int64_t stream) {
  return {key.seed_low, key.seed_high, key.sample, static_cast<uint32_t>(step),
          static_cast<uint32_t>(stream)};
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
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(r * -0x1.62e430p+0f));
  asm("sin.approx.ftz.f32 %0, %1;" : "=f"(s) : "f"(phi));
  asm("cos.approx.ftz.f32 %0, %1;" : "=f"(c) : "f"(phi));
  c = __uint_as_float(__float_as_uint(c) ^ (b & 0x80000000u));
  const bool swap = (b & 0x40000000u) != 0;
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
  uint32_t words[4] = {block, draw.sample, draw.step, draw.stream};
  philox4x32<Scalar>(words, draw.seed_low, draw.seed_high);
  if constexpr (kFast) {
    box_muller_fast(words[0], words[1], z[0], z[1]);
    box_muller_fast(words[2], words[3], z[2], z[3]);
  } else {
    box_muller<Scalar>(words[0], words[1], z[0], z[1]);
    box_muller<Scalar>(words[2], words[3], z[2], z[3]);
  }
}

template <class L, class T, bool kFast>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    randn_kernel(const __grid_constant__ RandnParams p, bool aligned) {
  for (int64_t b = first_sample(); b < p.batch; b += sample_stride()) {
    const Draw draw =
        make_draw(noise_key(p.keys, p.seed, p.sample_offset, b), p.step, p.stream);
    T* const out = static_cast<T*>(p.out.data) + b * p.n;
    for (int64_t e = first_element<L>(); e < p.n; e += element_stride<L>()) {
      float z[L::kWidth];
      FD_UNROLL
      for (int g = 0; g < L::kGroups; ++g) {
        const int64_t block = p.first_block + (e + g * L::kGroupStride) / 4;
        normal_block<kFast>(draw, static_cast<uint32_t>(block), z + 4 * g);
      }
      store<L>(out, Chunk{e, p.n, aligned && e + L::kReach <= p.n}, z);
    }
  }
}

}  // namespace fastdiff
