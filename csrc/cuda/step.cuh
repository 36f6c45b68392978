// The fused solver step (fastdiff/ops/step.py) on the GPU: any structure, any mix of types, any
// size. A thread takes a chunk of every column in turn and adds it to the sums it belongs to, so
// each tensor is read once; it stores only after its last read, so any output may be the memory of
// any state. plain.cuh does the few structures that most launches have.
#pragma once

#include "../include/exp.h"
#include "randn.cuh"

namespace fastdiff {

// One row of the coefficient table; outside the table every entry is NaN.
struct Row {
  const float* entries;
  uint32_t index;

  static __device__ __forceinline__ Row of(const StepParams& p, uint32_t b) {
    const int64_t index = __ldg(p.rows + (p.rows_stride ? b : 0));
    const bool inside = static_cast<uint64_t>(index) < static_cast<uint64_t>(p.table_rows);
    const uint32_t row = static_cast<uint32_t>(index);
    const uint32_t first = row * static_cast<uint32_t>(p.table_width);
    return {inside ? static_cast<const float*>(p.table) + first : nullptr, row};
  }
  __device__ __forceinline__ float operator[](int entry) const {
    return entries ? __ldg(entries + entry) : bit_cast<float>(0x7fc00000u);
  }
  // Zero, which means unused, where the mask does not name the column.
  __device__ __forceinline__ float weight(int mask, int column, int first_entry) const {
    return mask >> column & 1 ? (*this)[first_entry + column] : 0.0f;
  }
};

// The noise of one draw of a row. A row outside of the table has no draws, nor a use for any.
__device__ __forceinline__ Draw draw_of(const StepParams& p, const Row& row, uint32_t b, int draw) {
  uint32_t step = static_cast<uint32_t>(p.step), stream = static_cast<uint32_t>(p.stream);
  if (p.draw_table && row.entries) {
    const int64_t* entry = p.draw_table + 2 * (row.index * p.draws + draw);
    step = static_cast<uint32_t>(__ldg(entry));
    stream = static_cast<uint32_t>(__ldg(entry + 1));
  }
  return Draw::of(noise_key(p.keys, p.seed, p.sample_offset, b), step, stream);
}

template <int kWidth>
__device__ __forceinline__ void accumulate(float (&sum)[kWidth], float weight,
                                           const float (&v)[kWidth]) {
  FD_UNROLL
  for (int k = 0; k < kWidth; ++k) sum[k] = sum[k] + weight * v[k];
}

// NaN passes.
template <int kWidth>
__device__ __forceinline__ void clamp(float (&c)[kWidth], float low, float high) {
  FD_UNROLL
  for (int k = 0; k < kWidth; ++k) c[k] = c[k] < low ? low : (c[k] > high ? high : c[k]);
}

// One chunk of one sample. L: its layout; up to kOutputs outputs.
template <class L, int kOutputs>
struct StepChunk {
  static constexpr int kWidth = L::kWidth;
  using Values = float[kWidth];

  const StepParams& p;
  const Row& row;
  const Chunk& chunk;
  const uint32_t b;
  Values sums[kOutputs], c, v, scale;

  __device__ __forceinline__ float output_weight(int r, int column) const {
    const int columns = p.states + 2 + p.draws;
    return r < p.outputs ? row.weight(p.output_mask[r], column, kHeader + (r + 1) * columns - 1)
                         : 0.0f;
  }

  // Adds column `column`, which read(v) fetches, to the clamp node and to every output; reads
  // nothing when nobody uses it. clamp_mask is over the same columns.
  template <class Read>
  __device__ __forceinline__ void column(int clamp_mask, int column, Read read) {
    const float inside = row.weight(clamp_mask, column, kHeader);
    float weight[kOutputs];
    bool used = inside != 0.0f;
    FD_UNROLL
    for (int r = 0; r < kOutputs; ++r) {
      weight[r] = output_weight(r, column);
      used = used || weight[r] != 0.0f;
    }
    if (!used) return;
    read();
    if (inside != 0.0f) accumulate(c, inside, v);
    FD_UNROLL
    for (int r = 0; r < kOutputs; ++r) {
      if (weight[r] != 0.0f) accumulate(sums[r], weight[r], v);
    }
  }

  __device__ __forceinline__ void read_model_output() {
    const int64_t offset = b * p.n * (p.learned ? 2 : 1);
    load_operand<L>(p.model_output[0], offset, chunk, v);
    if (p.model_outputs != 2) return;
    const float g = __ldg(p.guidance_scale + b * p.guidance_stride);
    Values conditional;
    load_operand<L>(p.model_output[1], offset, chunk, conditional);
    FD_UNROLL
    for (int k = 0; k < kWidth; ++k) v[k] = v[k] + g * (conditional[k] - v[k]);
  }

  __device__ __forceinline__ void read_noise(int draw) {
    if (!p.seeded) {
      load_operand<L>(p.noise[draw], b * p.n, chunk, v);
      return;
    }
    const Draw source = draw_of(p, row, b, draw);
    FD_UNROLL
    for (int g = 0; g < L::kGroups; ++g) {
      normal_block(p.fast, source, chunk.block + g * L::kStride, v + 4 * g);
      round_group(p.noise_dtype, v + 4 * g);
    }
  }

  // The factor of the noise coefficients: learned variance, else nothing to do.
  __device__ __forceinline__ void read_noise_scale() {
    const float low = row[3], high = row[4];
    load_operand<L>(p.model_output[p.model_outputs - 1], (2 * int64_t{b} + 1) * p.n, chunk, scale);
    FD_UNROLL
    for (int k = 0; k < kWidth; ++k) {
      scale[k] = learned_scale<Scalar>(scale[k], low, high);
    }
  }

  __device__ __forceinline__ void add_noise(Values& sum, float weight) {
    if (weight == 0.0f) return;
    FD_UNROLL
    for (int k = 0; k < kWidth; ++k) {
      sum[k] = sum[k] + (p.learned ? weight * scale[k] : weight) * v[k];
    }
  }

  __device__ __forceinline__ void noise_columns(bool into_clamp) {
    FD_NO_UNROLL
    for (int k = 0; k < p.draws; ++k) {
      const float inside = row.weight(into_clamp ? p.clamp_mask : 0, p.states + 1 + k, kHeader);
      float weight[kOutputs];
      bool used = inside != 0.0f;
      FD_UNROLL
      for (int r = 0; r < kOutputs; ++r) {
        weight[r] = into_clamp ? 0.0f : output_weight(r, p.states + 2 + k);
        used = used || weight[r] != 0.0f;
      }
      if (!used) continue;
      if (p.learned) read_noise_scale();
      read_noise(k);
      add_noise(c, inside);
      FD_UNROLL
      for (int r = 0; r < kOutputs; ++r) add_noise(sums[r], weight[r]);
    }
  }

  __device__ __forceinline__ void clamp_node() {
    // Noise inside the clamp node comes before it, noise in the outputs after: drawn twice.
    if (p.clamp_mask >> (p.states + 1)) noise_columns(true);
    if (!p.threshold) {
      clamp(c, row[0], row[1]);
      return;
    }
    const float bound = __ldg(p.threshold + b * p.threshold_stride);
    const float inverse = __fdiv_rn(1.0f, bound);
    clamp(c, -bound, bound);
    FD_UNROLL
    for (int k = 0; k < kWidth; ++k) c[k] = c[k] * inverse;
  }

  __device__ __forceinline__ void run() {
    FD_UNROLL
    for (int k = 0; k < kWidth; ++k) {
      c[k] = kNegativeZero;
      FD_UNROLL
      for (int r = 0; r < kOutputs; ++r) sums[r][k] = kNegativeZero;
    }
    bool clamped = false;  // the clamp node matters only to an output that uses it
    if (p.clamp_mask >= 0) {
      FD_UNROLL
      for (int r = 0; r < kOutputs; ++r) {
        clamped = clamped || output_weight(r, p.states + 1) != 0.0f;
      }
    }
    const int clamp_mask = clamped ? p.clamp_mask : 0;
    FD_NO_UNROLL
    for (int k = 0; k < p.states; ++k) {
      column(clamp_mask, k, [&] { load_operand<L>(p.state[k], b * p.n, chunk, v); });
    }
    if (p.model_outputs) column(clamp_mask, p.states, [&] { read_model_output(); });
    if (clamped) {
      clamp_node();
      FD_UNROLL
      for (int r = 0; r < kOutputs; ++r) {
        const float weight = output_weight(r, p.states + 1);
        if (weight != 0.0f) accumulate(sums[r], weight, c);
      }
    }
    if (p.draws) noise_columns(false);
    FD_UNROLL
    for (int r = 0; r < kOutputs; ++r) {
      if (r < p.outputs) store_operand<L>(p.out[r], b * p.n, chunk, sums[r]);
    }
    if (p.model_input_copies > 0) write_model_input();
  }

  // From the output as stored, so that a step and a scaling in two calls give the same.
  __device__ __forceinline__ void write_model_input() {
    const float c_in = row[2];
    FD_UNROLL
    for (int g = 0; g < L::kGroups; ++g) round_group(p.out[0].dtype, sums[0] + 4 * g);
    FD_UNROLL
    for (int k = 0; k < kWidth; ++k) v[k] = c_in * sums[0][k];
    FD_NO_UNROLL
    for (int copy = 0; copy < p.model_input_copies; ++copy) {
      store_operand<L>(p.model_input, (copy * p.batch + b) * p.n, chunk, v);
    }
  }
};

// More than two outputs take four elements at a time, or the sums would not stay in registers.
template <int kOutputs>
using StepLayout = Layout<(kOutputs > 2 ? 4 : 8), false>;

// Eight elements of two sums, and noise beside them, take 72 registers.
template <int kOutputs>
constexpr int kStepBlocks = kOutputs > 4 ? 2 : (kOutputs == 2 ? 3 : kResidentBlocksGeneral);

template <int kOutputs>
__global__ void __launch_bounds__(kThreads, kStepBlocks<kOutputs>)
    step_kernel(const __grid_constant__ StepParams p, bool aligned) {
  const uint32_t b = sample_index();
  if (b >= p.batch) return;
  const Row row = Row::of(p, b);
  for_each_chunk<StepLayout<kOutputs>>(p.n, aligned, [&](auto layout, const Chunk& chunk) {
    StepChunk<decltype(layout), kOutputs>{p, row, chunk, b, {}, {}, {}, {}}.run();
  });
}

}  // namespace fastdiff
