// The few steps that most launches are, each as straight-line code: q_sample, DDPM, DDIM and Euler,
// with or without guidance. step.cuh does these too, and everything else; the bits are the same.
//
// One state, one output, seeded noise or none, fixed variance, bounds from the table; state, output
// and noise stored as State, model output and model input as Model, all of it aligned and in whole
// Philox blocks. That leaves 32 registers enough, so that the GPU is full of threads.
#pragma once

#include "step.cuh"

namespace fastdiff {

template <class State_, class Model_, bool kModel_, bool kClamp_, bool kNoise_, bool kFast_>
struct Plain {
  using State = State_;
  using Model = Model_;
  static constexpr bool kModel = kModel_, kClamp = kClamp_, kNoise = kNoise_, kFast = kFast_;
  using L = Layout<8, sizeof(State) == 4 && sizeof(Model) == 4>;
  // A clamp node, or two packed operands beside noise, take threads away for the registers that
  // they need: 40 or 48.
  static constexpr bool kMixed = sizeof(State) != sizeof(Model);
  static constexpr int kMost = kClamp ? (kFast || sizeof(Model) == 2 ? 5 : 6)
                                      : (kFast && kModel && sizeof(Model) == 2 ? 6 : 8);
  static constexpr int kResident = kResidentBlocks > kMost ? kMost : kResidentBlocks;
};

// Eight elements of one operand, handed out in groups of four. 16-bit ones are fetched together, in
// one access, and stay packed; float32 ones come a group, that is an access, at a time. Addresses
// are computed at each access: kept, they would take a fifth of the registers.
template <class T, class L>
struct Source {
  uint4 words = {0, 0, 0, 0};  // what an unused operand reads as: zeros

  static __device__ __forceinline__ const T* at(const Operand& operand, int64_t element) {
    return static_cast<const T*>(operand.data) + element;
  }
  __device__ __forceinline__ void fetch(const Operand& operand, int64_t first) {
    if constexpr (sizeof(T) == 2) words = *reinterpret_cast<const uint4*>(at(operand, first));
  }
  __device__ __forceinline__ void read(const Operand& operand, int64_t first, int g, bool used,
                                       float (&v)[4]) const {
    if constexpr (sizeof(T) == 2) {
      unpack<T>(g ? words.z : words.x, v[0], v[1]);
      unpack<T>(g ? words.w : words.y, v[2], v[3]);
    } else {
      v[0] = v[1] = v[2] = v[3] = 0.0f;
      if (used) load_whole<Layout<4, false>>(at(operand, first + 4 * g * L::kStride), v);
    }
  }
};

template <class T, class L>
struct Sink {
  uint4 words;

  // `copies` of the group, `apart` elements from each other.
  __device__ __forceinline__ void write(const Operand& operand, int64_t first, int g, int copies,
                                        int64_t apart, const float (&v)[4]) {
    if constexpr (sizeof(T) == 2) {
      (g ? words.z : words.x) = pack<T>(v[0], v[1]);
      (g ? words.w : words.y) = pack<T>(v[2], v[3]);
      if (g + 1 < L::kGroups) return;
    }
    T* target = static_cast<T*>(operand.data) + first;
    FD_NO_UNROLL
    for (int copy = 0; copy < copies; ++copy, target += apart) {
      if constexpr (sizeof(T) == 2) {
        *reinterpret_cast<uint4*>(target) = words;
      } else {
        store_whole<Layout<4, false>>(target + 4 * g * L::kStride, v);
      }
    }
  }
};

__device__ __forceinline__ float guidance_of(const StepParams& p, uint32_t b) {
  return __ldg(p.guidance_scale + b * p.guidance_stride);
}

// The coefficients of one row, and what they make necessary.
template <class P>
struct PlainRow {
  float state, model, clamp, noise;  // of the output
  float state_inside, model_inside;  // of the clamp node
  float low, high, guidance;
  bool reads_state, reads_model;

  __device__ __forceinline__ PlainRow(const StepParams& p, const Row& row, uint32_t b) {
    constexpr int kOutput = kHeader + 2 + P::kNoise;
    state = row[kOutput];
    model = P::kModel && !P::kClamp ? row[kOutput + 1] : 0.0f;
    clamp = P::kClamp ? row[kOutput + 2] : 0.0f;
    noise = P::kNoise ? row[kOutput + 3] : 0.0f;
    const bool clamped = clamp != 0.0f;
    state_inside = clamped ? row[kHeader] : 0.0f;
    model_inside = clamped ? row[kHeader + 1] : 0.0f;
    low = clamped ? row[0] : 0.0f;
    high = clamped ? row[1] : 0.0f;
    guidance = p.model_outputs == 2 ? guidance_of(p, b) : 0.0f;
    reads_state = state != 0.0f || state_inside != 0.0f;
    reads_model = model != 0.0f || model_inside != 0.0f;
  }
};

// All chunks of this thread. kDense: state and model output are known to be used.
template <class P, bool kDense>
__device__ __forceinline__ void plain_sample(const StepParams& p, const PlainRow<P>& weights,
                                             const Draw& draw, uint32_t b) {
  using L = typename P::L;
  const bool reads_state = kDense || weights.reads_state;
  const bool reads_model = P::kModel && (kDense || weights.reads_model);
  for_each_block<L>(p.n, [&](uint32_t block, uint32_t last) {
    const auto element = [&](uint32_t at) { return b * p.n + static_cast<int64_t>(at) * 4; };
    const int64_t first = kDense ? hidden(element(block)) : element(block);
    Source<typename P::State, L> state;
    Source<typename P::Model, L> model, conditional;
    Sink<typename P::State, L> out;
    Sink<typename P::Model, L> input;
    if (reads_state) state.fetch(p.state[0], first);
    if (reads_model) {
      model.fetch(p.model_output[0], first);
      if (kDense && p.model_outputs == 2) conditional.fetch(p.model_output[1], first);
    }
    const auto read_model = [&](int g, float (&o)[4]) {
      model.read(p.model_output[0], first, g, true, o);
      if (p.model_outputs != 2) return;
      // Held where registers are left for it, else loaded anew.
      constexpr bool kHeld = kDense && sizeof(typename P::Model) == 2;
      const float g_scale = kHeld ? weights.guidance : guidance_of(p, hidden(b));
      // Two packed operands at a time are too many here; the second fetch is from L1.
      if (!kDense) conditional.fetch(p.model_output[1], first);
      float other[4];
      conditional.read(p.model_output[1], first, g, true, other);
      FD_UNROLL
      for (int k = 0; k < 4; ++k) o[k] = o[k] + g_scale * (other[k] - o[k]);
    };

    FD_UNROLL
    for (int g = 0; g < L::kGroups; ++g) {
      if (L::kStride > 1 && block + g * L::kStride > last) break;
      float sum[4], v[4];
      state.read(p.state[0], first, g, reads_state, v);
      if constexpr (P::kClamp) {
        float c[4];
        FD_UNROLL
        for (int k = 0; k < 4; ++k) {
          sum[k] = weights.state != 0.0f ? weights.state * v[k] : kNegativeZero;
          c[k] = weights.state_inside != 0.0f ? weights.state_inside * v[k] : kNegativeZero;
        }
        if (reads_model) {
          read_model(g, v);
          accumulate(c, weights.model_inside, v);
        }
        clamp(c, weights.low, weights.high);
        if (weights.clamp != 0.0f) accumulate(sum, weights.clamp, c);
      } else {
        // An unused state reads as 0, and 0 * -1 is the empty sum.
        const float weight = kDense || weights.state != 0.0f ? weights.state : -1.0f;
        FD_UNROLL
        for (int k = 0; k < 4; ++k) sum[k] = weight * v[k];
        if (reads_model) {
          read_model(g, v);
          accumulate(sum, weights.model, v);
        }
      }
      if (P::kNoise && weights.noise != 0.0f) {
        normal_block<P::kFast>(draw, block + g * L::kStride, v);
        round_group<typename P::State>(v);
        accumulate(sum, weights.noise, v);
      }
      const int64_t target = P::kMixed && P::kNoise ? element(hidden(block)) : first;
      out.write(p.out[0], target, g, 1, 0, sum);
      if (p.model_input_copies > 0) {
        const float c_in = Row::of(p, hidden(b))[2];
        round_group<typename P::State>(sum);
        FD_UNROLL
        for (int k = 0; k < 4; ++k) sum[k] = c_in * sum[k];
        input.write(p.model_input, target, g, p.model_input_copies, p.batch * p.n, sum);
      }
    }
  });
}

template <class P>
__global__ void __launch_bounds__(kThreads, P::kResident)
    plain_kernel(const __grid_constant__ StepParams p) {
  const uint32_t b = sample_index();
  if (b >= p.batch) return;
  const Row row = Row::of(p, b);
  const PlainRow<P> weights(p, row, b);
  const Draw draw = draw_of(p, row, b, 0);
  // Beside noise or a clamp node the branches that this saves do not count.
  if (!P::kNoise && !P::kClamp && weights.reads_state && weights.reads_model) {
    plain_sample<P, true>(p, weights, draw, b);
  } else {
    plain_sample<P, false>(p, weights, draw, b);
  }
}

}  // namespace fastdiff
