// The few steps that most launches are, each as straight-line code: q_sample, DDPM, DDIM and Euler,
// with or without guidance. step.cuh does these too, and everything else; the bits are the same.
//
// One state, one output, seeded noise or none, fixed variance, bounds from the table; state, output
// and noise stored as State, model outputs and model input as Model, all of it aligned and in whole
// Philox blocks. What the row and the draw say is the same for a warp and kept in uniform
// registers.
#pragma once

#include "step.cuh"

namespace fastdiff {

// A launch: the step, and its index space in Philox blocks, which 32 bits count.
struct PlainParams {
  StepParams step;
  uint32_t last;    // block of a sample
  uint32_t stride;  // from a thread's chunk to its next
  int64_t copy;     // bytes from model_input to its second copy
};

// kModels: outputs of the model, 2 with guidance.
template <class State_, class Model_, int kModels_, bool kClamp_, bool kNoise_, bool kFast_>
struct Plain {
  using State = State_;
  using Model = Model_;
  static constexpr int kModels = kModels_;
  static constexpr bool kClamp = kClamp_, kNoise = kNoise_, kFast = kFast_;
  using L = Layout<8, sizeof(State) == 4 && sizeof(Model) == 4>;
  // Blocks an SM where 32 registers are too few: 16-bit operands, held packed, beside noise.
  static constexpr bool kPacked = kNoise && kModels > 0 && sizeof(Model) == 2;
  static constexpr int kMost = !kPacked                 ? 8
                               : kModels == 2 && kClamp ? 5
                               : kModels == 2 || !kFast ? 6
                                                        : 8;
  static constexpr int kResident = kResidentBlocks > kMost ? kMost : kResidentBlocks;
};

template <class T>
__device__ __forceinline__ T* at(const Operand& operand, int64_t offset) {
  return reinterpret_cast<T*>(static_cast<char*>(operand.data) + offset);
}

// A chunk of one operand, handed out in groups of four. 16-bit elements are fetched together, in
// one access, and stay packed; float32 ones come a group, that is an access, at a time. Addresses
// are computed at each access from one offset for all operands: kept, they would take too many
// registers.
template <class T, class L>
struct Source {
  uint4 words = {0, 0, 0, 0};  // what an unused operand reads as: zeros

  __device__ __forceinline__ void fetch(const Operand& operand, int64_t offset) {
    if constexpr (sizeof(T) == 2) words = *at<const uint4>(operand, offset);
  }
  __device__ __forceinline__ void read(const Operand& operand, int64_t offset, int g, bool used,
                                       float (&v)[4]) const {
    if constexpr (sizeof(T) == 2) {
      unpack<T>(g ? words.z : words.x, v[0], v[1]);
      unpack<T>(g ? words.w : words.y, v[2], v[3]);
    } else {
      v[0] = v[1] = v[2] = v[3] = 0.0f;
      const T* source = at<const T>(operand, offset) + 4 * g * L::kStride;
      if (used) load_whole<Layout<4, false>>(source, v);
    }
  }
};

template <class T, class L>
struct Sink {
  uint4 words;

  __device__ __forceinline__ void put(int g, const float (&v)[4]) {
    if constexpr (sizeof(T) == 2) {
      (g ? words.z : words.x) = pack<T>(v[0], v[1]);
      (g ? words.w : words.y) = pack<T>(v[2], v[3]);
    }
  }
  __device__ __forceinline__ void write(const Operand& operand, int64_t offset, int g,
                                        const float (&v)[4]) const {
    if constexpr (sizeof(T) == 4) {
      store_whole<Layout<4, false>>(at<T>(operand, offset) + 4 * g * L::kStride, v);
    } else if (g + 1 == L::kGroups) {
      *at<uint4>(operand, offset) = words;
    }
  }
};

// The coefficients of one row, and what they make necessary.
template <class P>
struct PlainRow {
  float state, model, clamp, noise;  // of the output
  float state_inside, model_inside;  // of the clamp node
  float low, high, guidance, c_in;
  bool reads_state, reads_model;

  __device__ __forceinline__ PlainRow(const StepParams& p, const Row& row, uint32_t b) {
    constexpr int kOutput = kHeader + 2 + P::kNoise;
    state = uniform(row[kOutput]);
    reads_state = state != 0.0f;
    if constexpr (P::kClamp) {
      low = uniform(row[0]);
      high = uniform(row[1]);
      state_inside = uniform(row[kHeader]);
      model_inside = uniform(row[kHeader + 1]);
      clamp = uniform(row[kOutput + 2]);
      reads_state = reads_state || (clamp != 0.0f && state_inside != 0.0f);
      reads_model = clamp != 0.0f && model_inside != 0.0f;
    } else if constexpr (P::kModels > 0) {
      model = uniform(row[kOutput + 1]);
      reads_model = model != 0.0f;
    }
    if constexpr (P::kNoise) noise = uniform(row[kOutput + 3]);
    if constexpr (P::kModels == 2) {
      // Nothing of what is not read may matter, an infinite scale neither.
      guidance = uniform(__ldg(p.guidance_scale + (p.guidance_stride ? b : 0)));
      if (!reads_model) guidance = 0.0f;
    }
    c_in = uniform(row[2]);
  }
};

// One chunk, which begins at byte `offset` of the state, `left` Philox blocks before the sample's
// last. kDense: state and model output are known to be used.
template <class P, bool kDense>
__device__ __forceinline__ void plain_chunk(const PlainParams& params, const PlainRow<P>& weights,
                                            const Draw& draw, uint32_t left, int64_t offset) {
  const StepParams& p = params.step;
  using L = typename P::L;
  using State = typename P::State;
  using Model = typename P::Model;
  // The same element in a tensor of Model.
  const int64_t model_offset = sizeof(State) == sizeof(Model) ? offset : offset / 2;
  const bool reads_state = kDense || weights.reads_state;
  const bool reads_model = P::kModels > 0 && (kDense || weights.reads_model);
  Source<State, L> state;
  Source<Model, L> model, conditional;
  Sink<State, L> out;
  Sink<Model, L> input;
  if (reads_state) state.fetch(p.state[0], offset);
  if (reads_model) {
    model.fetch(p.model_output[0], model_offset);
    if constexpr (P::kModels == 2) conditional.fetch(p.model_output[1], model_offset);
  }
  FD_UNROLL
  for (int g = 0; g < L::kGroups; ++g) {
    if (L::kStride > 1 && left < static_cast<uint32_t>(g * L::kStride)) break;
    float sum[4], v[4], o[4];
    state.read(p.state[0], offset, g, reads_state, v);
    if constexpr (P::kModels > 0) model.read(p.model_output[0], model_offset, g, reads_model, o);
    if constexpr (P::kModels == 2) {
      float other[4];
      conditional.read(p.model_output[1], model_offset, g, reads_model, other);
      FD_UNROLL
      for (int k = 0; k < 4; ++k) o[k] = o[k] + weights.guidance * (other[k] - o[k]);
    }
    if constexpr (P::kClamp) {
      FD_UNROLL
      for (int k = 0; k < 4; ++k) {
        sum[k] = weights.state != 0.0f ? weights.state * v[k] : kNegativeZero;
        v[k] = weights.state_inside != 0.0f ? weights.state_inside * v[k] : kNegativeZero;
      }
      if (reads_model) accumulate(v, weights.model_inside, o);
      clamp(v, weights.low, weights.high);
      if (weights.clamp != 0.0f) accumulate(sum, weights.clamp, v);
    } else {
      // An unused operand reads as 0, and 0 * -1 is the empty sum.
      const float weight = reads_state ? weights.state : -1.0f;
      FD_UNROLL
      for (int k = 0; k < 4; ++k) sum[k] = weight * v[k];
      if constexpr (P::kModels > 0) accumulate(sum, reads_model ? weights.model : -1.0f, o);
    }
    if (P::kNoise && weights.noise != 0.0f) {
      normal_block<P::kFast>(draw, params.last - left + g * L::kStride, v);
      round_group<State>(v);
      accumulate(sum, weights.noise, v);
    }
    out.put(g, sum);
    out.write(p.out[0], offset, g, sum);
    if (p.model_input_copies > 0) {
      round_group<State>(sum);
      FD_UNROLL
      for (int k = 0; k < 4; ++k) sum[k] = weights.c_in * sum[k];
      input.put(g, sum);
      input.write(p.model_input, model_offset, g, sum);
      if (p.model_input_copies > 1) input.write(p.model_input, model_offset + params.copy, g, sum);
    }
  }
}

// All chunks of this thread.
template <class P, bool kDense>
__device__ __forceinline__ void plain_chunks(const PlainParams& params, const PlainRow<P>& weights,
                                             const Draw& draw, uint32_t left, int64_t offset) {
  while (true) {
    plain_chunk<P, kDense>(params, weights, draw, left, offset);
    if (left < params.stride) return;
    left -= params.stride;
    offset = hidden(offset + int64_t{4 * sizeof(typename P::State)} * params.stride);
  }
}

template <class P>
__global__ void __launch_bounds__(kThreads, P::kResident)
    plain_kernel(const __grid_constant__ PlainParams params) {
  using L = typename P::L;
  const StepParams& p = params.step;
  const uint32_t b = sample_index();
  if (b >= p.batch) return;
  const Row row = Row::of(p, b);
  const PlainRow<P> weights(p, row, b);
  Draw draw{};
  if constexpr (P::kNoise) draw = uniform(draw_of(p, row, b, 0));
  const uint32_t block = blockIdx.x * (blockDim.x * L::kGroups) + L::first(threadIdx.x);
  if (block > params.last) return;
  const int64_t offset =
      (b * p.n + int64_t{4} * block) * static_cast<int64_t>(sizeof(typename P::State));
  // Beside noise or a clamp node the branches that this saves do not count.
  if (!P::kNoise && !P::kClamp && weights.reads_state && weights.reads_model) {
    plain_chunks<P, true>(params, weights, draw, params.last - block, offset);
  } else {
    plain_chunks<P, false>(params, weights, draw, params.last - block, offset);
  }
}

}  // namespace fastdiff
