// The fused solver step (fastdiff/ops/step.py) on the GPU: one pass over a sample's elements.
//
// A thread takes a chunk of every column in turn and adds it to the sums it belongs to, so each
// tensor is read once, and stores only after its last read: any output may be any state's memory.
// What a step consists of is asked of a Shape: of the parameters (AnyStep) or of constants
// (PlainStep, the few steps worth their own kernel). Both run the same lines below.
#pragma once

#include <type_traits>

#include "../include/exp.h"
#include "randn.cuh"

namespace fastdiff {

// Stands for "the operand's own dtype says".
struct AnyType {};

// Any step with up to kOutputs_ outputs.
template <int kOutputs_>
struct AnyStep {
  using State = AnyType;
  using Model = AnyType;
  // More sums than registers for eight elements of each: take four.
  using L = Layout<(kOutputs_ > 2 ? 4 : 8), false>;
  static constexpr int kOutputs = kOutputs_;
  static constexpr bool kPlain = false;

  static __device__ __forceinline__ int states(const StepParams& p) { return p.states; }
  static __device__ __forceinline__ int draws(const StepParams& p) { return p.draws; }
  static __device__ __forceinline__ bool reads_model(const StepParams& p) {
    return p.model_outputs > 0;
  }
  static __device__ __forceinline__ int clamp_mask(const StepParams& p) { return p.clamp_mask; }
  static __device__ __forceinline__ int output_mask(const StepParams& p, int r) {
    return r < p.outputs ? p.output_mask[r] : 0;
  }
  static __device__ __forceinline__ bool fast(const StepParams& p) { return p.fast; }
};

// One state, one output, seeded noise or none, fixed variance, bounds from the table; the state
// and output stored as State_, the model's output as Model_, noise rounded to State_.
template <class State_, class Model_, bool kModel, bool kClamp, bool kNoise, bool kFast>
struct PlainStep {
  using State = State_;
  using Model = Model_;
  static constexpr bool kSplit = sizeof(State) == 4 && sizeof(Model) == 4;
  using L = Layout<8, kSplit>;
  static constexpr int kOutputs = 1;
  static constexpr bool kPlain = true;
  // Over [S, o]; [S, o, c, z]. With a clamp node the model output is used through it alone.
  static constexpr int kClampMask = kClamp ? 3 : -1;
  static constexpr int kOutputMask = 1 | (kModel && !kClamp) << 1 | kClamp << 2 | kNoise << 3;

  static constexpr __device__ int states(const StepParams&) { return 1; }
  static constexpr __device__ int draws(const StepParams&) { return kNoise; }
  static constexpr __device__ bool reads_model(const StepParams&) { return kModel; }
  static constexpr __device__ int clamp_mask(const StepParams&) { return kClampMask; }
  static constexpr __device__ int output_mask(const StepParams&, int) { return kOutputMask; }
  static constexpr __device__ bool fast(const StepParams&) { return kFast; }
};

// One row of the coefficient table; outside the table every entry is NaN.
struct Row {
  const float* entries;
  int64_t index;

  static __device__ __forceinline__ Row of(const StepParams& p, int64_t b) {
    const int64_t index = __ldg(p.rows + b * p.rows_stride);
    const bool inside = index >= 0 && index < p.table_rows;
    return {inside ? static_cast<const float*>(p.table) + index * p.table_width : nullptr, index};
  }
  __device__ __forceinline__ float operator[](int entry) const {
    return entries ? __ldg(entries + entry) : bit_cast<float>(0x7fc00000u);
  }
};

// The coefficients of one column: in the clamp node and in every output. Zero: not used.
template <class Shape>
struct Weights {
  float clamp, out[Shape::kOutputs];
  bool any;

  // clamp_column is negative for a column that the clamp node does not have.
  __device__ __forceinline__ Weights(const StepParams& p, const Row& row, int clamp_mask,
                                     int clamp_column, int column) {
    const int columns = Shape::states(p) + 2 + Shape::draws(p);
    const bool in_clamp = clamp_column >= 0 && (clamp_mask >> clamp_column & 1);
    clamp = in_clamp ? row[kHeader + clamp_column] : 0.0f;
    any = clamp != 0.0f;
    FD_UNROLL
    for (int r = 0; r < Shape::kOutputs; ++r) {
      const bool in_output = Shape::output_mask(p, r) >> column & 1;
      out[r] = in_output ? row[kHeader + columns - 1 + r * columns + column] : 0.0f;
      any = any || out[r] != 0.0f;
    }
  }
};

// kDense: the caller knows that the weight is not zero where its mask bit is set.
template <bool kDense, int kWidth>
__device__ __forceinline__ void accumulate(float (&sum)[kWidth], float weight,
                                           const float (&v)[kWidth]) {
  if (!kDense && weight == 0.0f) return;
  FD_UNROLL
  for (int k = 0; k < kWidth; ++k) sum[k] = sum[k] + weight * v[k];
}

template <class T, class L>
__device__ __forceinline__ void load_operand(const Operand& operand, int64_t offset,
                                             const Chunk& chunk, float (&v)[L::kWidth]) {
  if constexpr (!std::is_same<T, AnyType>::value) {
    load<L>(static_cast<const T*>(operand.data) + offset, chunk, v);
  } else {
    with_type(operand.dtype, [&](auto type) {
      load<L>(static_cast<const typename decltype(type)::Type*>(operand.data) + offset, chunk, v);
    });
  }
}

template <class T, class L>
__device__ __forceinline__ void store_operand(const Operand& operand, int64_t offset,
                                              const Chunk& chunk, const float (&v)[L::kWidth]) {
  if constexpr (!std::is_same<T, AnyType>::value) {
    store<L>(static_cast<T*>(operand.data) + offset, chunk, v);
  } else {
    with_type(operand.dtype, [&](auto type) {
      store<L>(static_cast<typename decltype(type)::Type*>(operand.data) + offset, chunk, v);
    });
  }
}

template <class T>
__device__ __forceinline__ void round_values(DType dtype, float* v, int groups) {
  for (int g = 0; g < groups; ++g) {
    if constexpr (!std::is_same<T, AnyType>::value) {
      round_group<T>(v + 4 * g);
    } else if (dtype == DType::bf16) {
      round_group<bf16_t>(v + 4 * g);
    } else if (dtype == DType::f16) {
      round_group<f16_t>(v + 4 * g);
    }
  }
}

// Everything that a chunk needs to know about its sample.
struct Sample {
  int64_t b;
  Row row;
  NoiseKey key;
  float guidance;
};

template <class Shape>
__device__ __forceinline__ void model_output(const StepParams& p, const Sample& sample,
                                             const Chunk& chunk, float (&o)[Shape::L::kWidth]) {
  using L = typename Shape::L;
  const int64_t offset = sample.b * p.n * (!Shape::kPlain && p.learned ? 2 : 1);
  load_operand<typename Shape::Model, L>(p.model_output[0], offset, chunk, o);
  if (p.model_outputs != 2) return;
  float conditional[L::kWidth];
  load_operand<typename Shape::Model, L>(p.model_output[1], offset, chunk, conditional);
  FD_UNROLL
  for (int k = 0; k < L::kWidth; ++k) o[k] = o[k] + sample.guidance * (conditional[k] - o[k]);
}

template <class Shape>
__device__ __forceinline__ void noise_values(const StepParams& p, const Sample& sample, int draw,
                                             const Chunk& chunk, float (&z)[Shape::L::kWidth]) {
  using L = typename Shape::L;
  if (!Shape::kPlain && !p.seeded) {
    load_operand<AnyType, L>(p.noise[draw], sample.b * p.n, chunk, z);
    return;
  }
  int64_t step = p.step, stream = p.stream;
  if (p.draw_table && sample.row.entries) {
    const int64_t* entry = p.draw_table + 2 * (sample.row.index * Shape::draws(p) + draw);
    step = __ldg(entry);
    stream = __ldg(entry + 1);
  }
  const Draw source = make_draw(sample.key, step, stream);
  FD_UNROLL
  for (int g = 0; g < L::kGroups; ++g) {
    const uint32_t block = static_cast<uint32_t>((chunk.first + g * L::kGroupStride) / 4);
    if (Shape::fast(p)) {
      normal_block<true>(source, block, z + 4 * g);
    } else {
      normal_block<false>(source, block, z + 4 * g);
    }
  }
  round_values<typename Shape::State>(p.noise_dtype, z, L::kGroups);
}

// The factor of the noise coefficients under learned variance.
template <class Shape>
__device__ __forceinline__ void noise_scale(const StepParams& p, const Sample& sample,
                                            const Chunk& chunk, float (&scale)[Shape::L::kWidth]) {
  using L = typename Shape::L;
  const float low = sample.row[3], high = sample.row[4];
  load_operand<AnyType, L>(p.model_output[p.model_outputs - 1], (2 * sample.b + 1) * p.n, chunk,
                           scale);
  FD_UNROLL
  for (int k = 0; k < L::kWidth; ++k) {
    const float f = scale[k] * 0.5f + 0.5f;
    scale[k] = exp_f32<Scalar>(f * high + (1.0f - f) * low);
  }
}

template <int kWidth>
__device__ __forceinline__ void clamp(float (&c)[kWidth], float low, float high) {
  FD_UNROLL
  for (int k = 0; k < kWidth; ++k) c[k] = c[k] < low ? low : (c[k] > high ? high : c[k]);
}

// One chunk. kDense: every coefficient of the masks is known not to be zero, so nothing branches.
template <class Shape, bool kDense>
__device__ __forceinline__ void step_chunk(const StepParams& p, const Sample& sample,
                                           const Chunk& chunk) {
  using L = typename Shape::L;
  constexpr int kWidth = L::kWidth;
  const int states = Shape::states(p), draws = Shape::draws(p);
  const Row& row = sample.row;
  const int64_t offset = sample.b * p.n;

  // The clamp node matters only to an output that uses it.
  const Weights<Shape> of_clamp(p, row, 0, -1, states + 1);
  const bool clamped = Shape::clamp_mask(p) >= 0 && (kDense || of_clamp.any);
  const int clamp_mask = clamped ? Shape::clamp_mask(p) : 0;

  float sums[Shape::kOutputs][kWidth], c[kWidth], v[kWidth];
  FD_UNROLL
  for (int k = 0; k < kWidth; ++k) {
    c[k] = kNegativeZero;
    FD_UNROLL
    for (int r = 0; r < Shape::kOutputs; ++r) sums[r][k] = kNegativeZero;
  }
  const auto add = [&](const Weights<Shape>& weights, int column, const float(&values)[kWidth]) {
    FD_UNROLL
    for (int r = 0; r < Shape::kOutputs; ++r) {
      if (kDense && !(Shape::output_mask(p, r) >> column & 1)) continue;
      accumulate<kDense>(sums[r], weights.out[r], values);
    }
  };

  // The states, then the model output: into the outputs and the clamp node in one reading.
  for (int k = 0; k < states + Shape::reads_model(p); ++k) {
    const Weights<Shape> weights(p, row, clamp_mask, k, k);
    if (!kDense && !weights.any) continue;
    if (k < states) {
      load_operand<typename Shape::State, L>(p.state[k], offset, chunk, v);
    } else {
      model_output<Shape>(p, sample, chunk, v);
    }
    if (!kDense || clamp_mask >> k & 1) accumulate<kDense>(c, weights.clamp, v);
    add(weights, k, v);
  }

  float scale[kWidth];
  bool scaled = false;  // scale holds the learned deviation
  const auto scale_noise = [&](float weight, float(&sum)[kWidth]) {
    if (weight == 0.0f) return;
    if (!scaled) noise_scale<Shape>(p, sample, chunk, scale);
    scaled = true;
    FD_UNROLL
    for (int k = 0; k < kWidth; ++k) sum[k] = sum[k] + weight * scale[k] * v[k];
  };
  const bool learned = !Shape::kPlain && p.learned;

  if (clamped) {
    if (!Shape::kPlain) {
      // Noise inside the clamp node comes before it, noise in the outputs after: drawn twice.
      for (int k = 0; k < draws; ++k) {
        const int column = states + 1 + k;
        const float weight = clamp_mask >> column & 1 ? row[kHeader + column] : 0.0f;
        if (weight == 0.0f) continue;
        noise_values<Shape>(p, sample, k, chunk, v);
        if (learned) {
          scale_noise(weight, c);
        } else {
          accumulate<false>(c, weight, v);
        }
      }
    }
    if (Shape::kPlain || !p.threshold) {
      clamp(c, row[0], row[1]);
    } else {
      const float bound = __ldg(p.threshold + sample.b * p.threshold_stride);
      const float inverse = __fdiv_rn(1.0f, bound);
      clamp(c, -bound, bound);
      FD_UNROLL
      for (int k = 0; k < kWidth; ++k) c[k] = c[k] * inverse;
    }
    add(of_clamp, states + 1, c);
  }

  for (int k = 0; k < draws; ++k) {
    const Weights<Shape> weights(p, row, 0, -1, states + 2 + k);
    if (!kDense && !weights.any) continue;
    noise_values<Shape>(p, sample, k, chunk, v);
    if (learned) {
      FD_UNROLL
      for (int r = 0; r < Shape::kOutputs; ++r) scale_noise(weights.out[r], sums[r]);
    } else {
      add(weights, states + 2 + k, v);
    }
  }

  FD_UNROLL
  for (int r = 0; r < Shape::kOutputs; ++r) {
    if (Shape::kPlain || r < p.outputs) {
      store_operand<typename Shape::State, L>(p.out[r], offset, chunk, sums[r]);
    }
  }
  if (p.model_input.data) {
    // From the output as stored, so that a split step gives the same input.
    round_values<typename Shape::State>(p.out[0].dtype, sums[0], L::kGroups);
    const float c_in = row[2];
    FD_UNROLL
    for (int k = 0; k < kWidth; ++k) sums[0][k] = c_in * sums[0][k];
    for (int copy = 0; copy < p.model_input_copies; ++copy) {
      store_operand<AnyType, L>(p.model_input, (copy * p.batch + sample.b) * p.n, chunk, sums[0]);
    }
  }
}

// Whether no coefficient that the masks of a PlainStep name is zero.
template <class Shape>
__device__ __forceinline__ bool is_dense(const StepParams& p, const Row& row) {
  bool dense = true;
  FD_UNROLL
  for (int k = 0; k < 2; ++k) {
    if (Shape::clamp_mask(p) >= 0 && Shape::clamp_mask(p) >> k & 1) dense &= row[kHeader + k] != 0;
  }
  FD_UNROLL
  for (int k = 0; k < 4; ++k) {
    if (Shape::output_mask(p, 0) >> k & 1) {
      dense &= row[kHeader + 2 + Shape::draws(p) + k] != 0;
    }
  }
  return dense;
}

template <class Shape>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    step_kernel(const __grid_constant__ StepParams p, bool aligned) {
  using L = typename Shape::L;
  for (int64_t b = first_sample(); b < p.batch; b += sample_stride()) {
    Sample sample;
    sample.b = b;
    sample.row = Row::of(p, b);
    sample.key = noise_key(p.keys, p.seed, p.sample_offset, b);
    sample.guidance =
        p.model_outputs == 2 ? __ldg(p.guidance_scale + b * p.guidance_stride) : 0.0f;
    const bool direct = aligned && (!Shape::kPlain || is_dense<Shape>(p, sample.row));
    for (int64_t e = first_element<L>(); e < p.n; e += element_stride<L>()) {
      const bool whole = e + L::kReach <= p.n;
      if (direct && whole) {
        step_chunk<Shape, Shape::kPlain>(p, sample, Chunk{e, p.n, true});
      } else {
        step_chunk<Shape, false>(p, sample, Chunk{e, p.n, aligned && whole});
      }
    }
  }
}

}  // namespace fastdiff
