// Bits drawn and bounded (fastdiff/ops/bits.py) on the GPU. A thread draws eight neighbours at a
// time; for a bound it adds up a leaf of 32 neighbours, and further launches add 32 such sums at a
// time until one is left. That is the tree of the definition, needs no thread to wait for another,
// and suits what is mostly short samples.
#pragma once

#include "../include/bits.h"
#include "pairwise.cuh"
#include "randn.cuh"

namespace fastdiff {

constexpr int kLeaf = 32;

// A sample's row of the table; NaN outside of it.
template <class P, int kColumns>
__device__ __forceinline__ void read_row(const P& p, uint32_t b, int columns,
                                         float (&row)[kColumns]) {
  const int64_t index = __ldg(p.rows + (p.rows_stride ? b : 0));
  const bool inside = static_cast<uint64_t>(index) < static_cast<uint64_t>(p.table_rows);
  const float* const entries = static_cast<const float*>(p.table) + (inside ? index * columns : 0);
  FD_UNROLL
  for (int k = 0; k < kColumns; ++k) {
    if (k < columns) row[k] = inside ? __ldg(entries + k) : bit_cast<float>(0x7fc00000u);
  }
}

// As load_operand(), and for bytes.
template <class L>
__device__ __forceinline__ void load_bits(const Operand& operand, int64_t offset,
                                          const Chunk& chunk, float (&v)[L::kWidth]) {
  if (operand.dtype != DType::u8) {
    load_operand<L>(operand, offset, chunk, v);
    return;
  }
  const uint8_t* const base = static_cast<const uint8_t*>(operand.data) + offset + chunk.first();
  FD_UNROLL
  for (int g = 0; g < L::kGroups; ++g) {
    uint32_t word = 0;
    if (chunk.whole) {
      word = *reinterpret_cast<const uint32_t*>(base + 4 * g * L::kStride);
    } else {
      FD_UNROLL
      for (int k = 0; k < 4; ++k) {
        if (4 * g + k < chunk.left) word |= static_cast<uint32_t>(base[4 * g + k]) << 8 * k;
      }
    }
    FD_UNROLL
    for (int k = 0; k < 4; ++k) v[4 * g + k] = static_cast<float>(word >> 8 * k & 0xffu);
  }
}

// Floating elements get `v`, bytes `set`.
template <class L>
__device__ __forceinline__ void store_bits(const Operand& operand, int64_t offset,
                                           const Chunk& chunk, const float (&v)[L::kWidth],
                                           uint32_t set) {
  if (operand.dtype != DType::u8) {
    store_operand<L>(operand, offset, chunk, v);
    return;
  }
  uint8_t* const base = static_cast<uint8_t*>(operand.data) + offset + chunk.first();
  FD_UNROLL
  for (int g = 0; g < L::kGroups; ++g) {
    if (chunk.whole) {
      // Bit k of four goes to byte k.
      const uint32_t four = set >> 4 * g & 15u;
      *reinterpret_cast<uint32_t*>(base + 4 * g * L::kStride) = four * 0x204081u & 0x1010101u;
    } else {
      FD_UNROLL
      for (int k = 0; k < 4; ++k) {
        if (4 * g + k < chunk.left) base[4 * g + k] = set >> (4 * g + k) & 1u;
      }
    }
  }
}

// word < 2^32 p, exactly: from 2^24 on a float has no part but the whole one.
__device__ __forceinline__ bool is_below(uint32_t word, float p) {
  if (!(p < 1.0f)) return p >= 1.0f;
  const float scaled = p * 0x1p32f;
  const uint32_t whole = static_cast<uint32_t>(scaled);
  return word < whole + (static_cast<float>(whole) < scaled ? 1u : 0u);
}

// The words of eight elements beside what becomes of as many logits: 80 registers, none spilled.
constexpr int kBitsBlocks = 3;

template <bool kLogits>
__global__ void __launch_bounds__(kThreads, kBitsBlocks)
    bits_kernel(const __grid_constant__ BitsParams p, bool aligned) {
  using L = Layout<8, false>;
  const uint32_t b = sample_index();
  if (b >= p.batch) return;
  float row[4] = {};
  read_row(p, b, kLogits ? 4 : 2, row);
  const NoiseKey key = noise_key(p.keys, p.seed, p.sample_offset, b);
  const Draw draw = Draw::of(key, static_cast<uint32_t>(p.step), static_cast<uint32_t>(p.stream));
  const int64_t offset = b * p.n;
  for_each_chunk<L>(p.n, aligned, [&](auto layout, const Chunk& chunk) {
    using Part = decltype(layout);
    float x[Part::kWidth] = {}, v[Part::kWidth];
    if (p.x.data) load_bits<Part>(p.x, offset, chunk, x);
    if constexpr (kLogits) load_operand<Part>(p.logits, offset, chunk, v);
    uint32_t set = 0;
    FD_UNROLL
    for (int g = 0; g < Part::kGroups; ++g) {
      uint32_t words[4];
      draw.words(chunk.block + g * Part::kStride, words);
      FD_UNROLL
      for (int k = 0; k < 4; ++k) {
        const int e = 4 * g + k;
        const bool given = x[e] != 0.0f;
        float probability;
        if constexpr (kLogits) {
          probability = bit_probability<Scalar>(v[e], given, row);
        } else {
          probability = given ? row[1] : row[0];
        }
        const bool drawn = is_below(words[k], probability);
        set |= drawn ? 1u << e : 0u;
        v[e] = probability == probability ? (drawn ? 1.0f : 0.0f) : probability;
      }
    }
    store_bits<Part>(p.out, offset, chunk, v, set);
  });
}

// Calls action(logit, x_t, x_start) for every element of a chunk and keeps what it gives.
template <class L, class Action>
__device__ __forceinline__ void each_bit(const BitsBoundParams& p, int64_t offset,
                                         const Chunk& chunk, float (&v)[L::kWidth], Action action) {
  float x_t[L::kWidth], x_start[L::kWidth];
  load_operand<L>(p.logits, offset, chunk, v);
  load_bits<L>(p.x_t, offset, chunk, x_t);
  load_bits<L>(p.x_start, offset, chunk, x_start);
  FD_UNROLL
  for (int k = 0; k < L::kWidth; ++k) v[k] = action(v[k], x_t[k] != 0.0f, x_start[k] != 0.0f);
}

template <bool kMixture>
__global__ void __launch_bounds__(kThreads, kBitsBlocks)
    bits_bound_kernel(const __grid_constant__ BitsBoundParams p, bool aligned) {
  using L = Layout<8, false>;
  const uint32_t b = sample_index();
  if (b >= p.batch) return;
  float row[kBitsColumns];
  read_row(p, b, kBitsColumns, row);
  const uint32_t leaves = static_cast<uint32_t>((p.n - 1) / kLeaf + 1);
  const uint32_t stride = gridDim.x * blockDim.x;
  for (uint32_t leaf = blockIdx.x * blockDim.x + threadIdx.x; leaf < leaves; leaf += stride) {
    float total = 0.0f, half = 0.0f;
    FD_NO_UNROLL
    for (int part = 0; part < kLeaf / L::kWidth; ++part) {
      const uint32_t block = leaf * (kLeaf / 4) + part * L::kGroups;
      const int64_t left = p.n - static_cast<int64_t>(block) * 4;
      float v[L::kWidth] = {};
      if (left > 0) {
        const Chunk chunk{block, left, aligned && left >= L::kReach};
        each_bit<L>(p, b * p.n, chunk, v, [&](float logit, bool x_t, bool x_start) {
          return bit_divergence<Scalar, kMixture>(logit, x_t, x_start, row);
        });
        FD_UNROLL
        for (int k = 0; k < L::kWidth; ++k) v[k] = k < left ? v[k] : 0.0f;
      }
      const float sum = pairwise_sum<L::kWidth>(v);
      half = part % 2 ? half + sum : sum;
      if (part == 1) total = half;
      if (part == 3) total = total + half;
    }
    if (leaves == 1) {
      static_cast<float*>(p.results)[b] = total * row[kBitsScale];
    } else {
      static_cast<float*>(p.partials)[b * p.partial_stride + leaf] = total;
    }
  }
}

// The sums from `first` on, `count` of them, by the leaf to behind them; the last sum of all is the
// result.
__global__ void __launch_bounds__(kThreads, kResidentBlocksGeneral)
    bits_bound_sum_kernel(const __grid_constant__ BitsBoundParams p, int64_t first, int64_t count) {
  const uint32_t b = sample_index();
  if (b >= p.batch) return;
  float* const sums = static_cast<float*>(p.partials) + b * p.partial_stride + first;
  const uint32_t leaves = static_cast<uint32_t>((count - 1) / kLeaf + 1);
  const uint32_t stride = gridDim.x * blockDim.x;
  for (uint32_t leaf = blockIdx.x * blockDim.x + threadIdx.x; leaf < leaves; leaf += stride) {
    float v[kLeaf];
    FD_UNROLL
    for (int k = 0; k < kLeaf; ++k) {
      const int64_t index = static_cast<int64_t>(leaf) * kLeaf + k;
      v[k] = index < count ? sums[index] : 0.0f;
    }
    const float total = pairwise_sum<kLeaf>(v);
    if (leaves > 1) {
      sums[count + leaf] = total;
    } else {
      float row[kBitsColumns];
      read_row(p, b, kBitsColumns, row);
      static_cast<float*>(p.results)[b] = total * row[kBitsScale];
    }
  }
}

template <bool kMixture>
__global__ void __launch_bounds__(kThreads, kResidentBlocksGeneral)
    bits_bound_grad_kernel(const __grid_constant__ BitsBoundParams p, bool aligned) {
  using L = Layout<8, false>;
  const uint32_t b = sample_index();
  if (b >= p.batch) return;
  float row[kBitsColumns];
  read_row(p, b, kBitsColumns, row);
  const float weight = __ldg(static_cast<const float*>(p.gradients) + b) * row[kBitsScale];
  for_each_chunk<L>(p.n, aligned, [&](auto layout, const Chunk& chunk) {
    using Part = decltype(layout);
    float v[Part::kWidth];
    each_bit<Part>(p, b * p.n, chunk, v, [&](float logit, bool x_t, bool x_start) {
      return bit_divergence_slope<Scalar, kMixture>(logit, x_t, x_start, row) * weight;
    });
    store_operand<Part>(p.gradient, b * p.n, chunk, v);
  });
}

}  // namespace fastdiff
