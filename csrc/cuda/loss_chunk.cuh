// What losses and their gradients (fastdiff/ops/loss.py) read and compute of the elements of one
// thread. The code is written once over the structure of a loss: where the kernel is made for one,
// the compiler leaves nothing but its straight line; AnyLoss reads it from the parameters.
#pragma once

#include "../include/loss.h"
#include "randn.cuh"

namespace fastdiff {

// The fields of LossParams that say which columns and functions there are.
struct LossFacts {
  int models, terms, error, bound, clamp, rho;
  bool density, learned, frozen, makes, seeded, fast;

  static FD_HD LossFacts of(const LossParams& p) {
    return {p.model_outputs, p.terms,   p.error,  p.bound, p.clamp,  p.rho,
            p.density,       p.learned, p.frozen, p.makes, p.seeded, p.fast && p.seeded};
  }

  FD_HD bool operator==(const LossFacts& other) const {
    return models == other.models && terms == other.terms && error == other.error &&
           bound == other.bound && clamp == other.clamp && rho == other.rho &&
           density == other.density && learned == other.learned && frozen == other.frozen &&
           makes == other.makes && seeded == other.seeded && fast == other.fast;
  }
};

// Blocks of kThreads an SM. Coefficients take registers of every thread where they are not uniform.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int kLossBlocks = 2;
#else
constexpr int kLossBlocks = kResidentBlocksGeneral;
#endif

struct AnyLoss {
  using X = void;
  using O = void;
  using L = Layout<4, false>;
  static constexpr int kResident = kLossBlocks;

  static __device__ __forceinline__ LossFacts facts(const LossParams& p) {
    return LossFacts::of(p);
  }
};

// The structures that most training runs have; kMost blocks of kThreads an SM leave them registers.
// A mean square of one model output, weighted, and the target made of x, of noise, or of both ...
template <int kMask>
struct SquareError {
  static constexpr bool kDraws = kMask >> 4 & 1;
  static constexpr int kWidth = 8;
  static constexpr int kMost = kMask == 0b10101 ? 5 : 6;
  static FD_HD constexpr LossFacts facts(bool fast) {
    return {1, kErrorTerm, kMask, 0, -1, kSquare, false, false, false, false, kDraws, fast};
  }
};
struct TargetError : SquareError<0b00101> {};    // x and o
struct NoiseError : SquareError<0b10100> {};     // o and z
struct VelocityError : SquareError<0b10101> {};  // x, o and z
// ... the hybrid loss of Nichol & Dhariwal 2021 of epsilon, with the prediction of x_0 as it is or
// clipped ...
template <bool kClips>
struct HybridError {
  static constexpr bool kDraws = true;
  static constexpr int kWidth = 4;  // or 64 registers would not do
  static constexpr int kMost = kLossBlocks;
  static FD_HD constexpr LossFacts facts(bool fast) {
    constexpr int kTerms = kErrorTerm | kBoundTerm;
    constexpr int kBound = kClips ? 0b1001 : 0b0111, kClamp = kClips ? 3 : -1;
    return {1, kTerms, 0b10100, kBound, kClamp, kSquare, false, true, true, false, true, fast};
  }
};
struct Hybrid : HybridError<false> {};
struct ClippedHybrid : HybridError<true> {};
// ... and the log-density of a step, for policy gradients.
struct StepDensity {
  static constexpr bool kDraws = false;
  static constexpr int kWidth = 8;
  static constexpr int kMost = 5;
  static FD_HD constexpr LossFacts facts(bool fast) {
    return {1, kBoundTerm, 0, 0b0111, -1, kSquare, true, false, false, false, false, fast};
  }
};

// x and y are stored as X, model outputs and their gradients as O, all of it aligned and samples in
// whole groups of four (eight where a type has 16 bits).
template <class Structure, class X_, class O_, bool kFast>
struct KnownLoss {
  using X = X_;
  using O = O_;
  using L = Layout<Structure::kWidth, Structure::kWidth == 8 && sizeof(X) == 4 && sizeof(O) == 4>;
  static constexpr int kMost = Structure::kMost;
  static constexpr int kResident = kResidentBlocks > kMost ? kMost : kResidentBlocks;

  static FD_HD constexpr LossFacts facts(const LossParams&) { return Structure::facts(kFast); }
};

// What the terms that are asked for need of the columns.
struct LossUse {
  bool x, y, o, z, c;
  bool e, d, x_start, v;  // the arguments of the terms, and the log variance

  static __device__ __forceinline__ LossUse of(const LossFacts& f, bool e, bool d, bool x_start,
                                               bool v, bool discretized) {
    const int error = e ? f.error : 0, mean = d || f.makes ? f.bound : 0;
    LossUse use;
    use.c = ((error | mean) & 8) || x_start;
    const int clamp = use.c ? f.clamp : 0;
    use.x = !f.makes && ((error | mean) & 1 || x_start || (d && !f.density && discretized));
    use.y = (error | mean) & 2 || clamp & 1;
    use.o = (error | mean) & 4 || clamp & 2;
    use.z = error & 16 || f.makes;
    use.e = e;
    use.d = d;
    use.x_start = x_start;
    use.v = v || (f.makes && f.learned);
    return use;
  }
};

// Bits of the columns of the table that the elements of a loss of this structure depend on, scales
// of the terms aside.
FD_HD uint32_t used_columns(const LossFacts& f) {
  uint32_t used = 0;
  if (f.clamp >= 0) used |= 1u << kLossLow | 1u << kLossHigh;
  if (f.clamp > 0) used |= static_cast<uint32_t>(f.clamp) << kClampY;
  used |= static_cast<uint32_t>(f.error) << kErrorX;
  if (f.rho == kHuber || f.rho == kPseudoHuber) used |= 1u << kDelta;
  used |= static_cast<uint32_t>(f.bound) << kBoundX;
  if (f.terms & kBoundTerm) {
    used |= f.learned ? 3u << kLogVariance0 : 1u << kHalfInverseVariance;
    if (!f.density) used |= 1u << kDiscretized | 1u << kFloor | 1u << kInverseStd;
    if (!f.density && f.learned) used |= 3u << kTrueLogVariance;
  }
  if (f.makes) used |= (f.learned ? 7u : 1u) << kSigma;
  return used;
}

// A sample's row of the table.
struct LossRow {
  const float* entries;  // null: outside of the table

  static __device__ __forceinline__ LossRow of(const LossParams& p, uint32_t b) {
    const int64_t index = __ldg(p.rows + (p.rows_stride ? b : 0));
    const bool inside = static_cast<uint64_t>(index) < static_cast<uint64_t>(p.table_rows);
    return {inside ? static_cast<const float*>(p.table) + index * kLossColumns : nullptr};
  }
  __device__ __forceinline__ float operator[](int column) const {
    return entries ? __ldg(entries + column) : bit_cast<float>(0x7fc00000u);
  }
};

// The coefficients of one sample, NaN where its row is outside of the table, and its noise. The
// same for all threads, and kept in uniform registers.
struct LossSample {
  float entries[kLossColumns];
  float guidance;
  Draw draw;
  BoundRow<float> bound;

  __device__ __forceinline__ LossSample(const LossParams& p, const LossFacts& f, const LossRow& row,
                                        uint32_t b) {
    const uint32_t used = used_columns(f);
    FD_UNROLL
    for (int k = 0; k < kLossColumns; ++k) {
      entries[k] = 0.0f;
      if (used >> k & 1) entries[k] = uniform(row[k]);
    }
    bound = BoundRow<float>::of([this](LossColumn column) { return entries[column]; });
    guidance =
        f.models == 2 ? uniform(__ldg(p.guidance_scale + (p.guidance_stride ? b : 0))) : 0.0f;
    draw = {};
    if (f.seeded) {
      const NoiseKey key = noise_key(p.keys, p.seed, p.sample_offset, b);
      draw = uniform(Draw::of(key, static_cast<uint32_t>(p.step), static_cast<uint32_t>(p.stream)));
    }
  }

  __device__ __forceinline__ float operator[](int column) const { return entries[column]; }
};

// T void: the type is known at run time. Else all groups of a chunk are there, or those behind the
// sample's end are not; these read as 0.
template <class T, class L>
__device__ __forceinline__ void load_column(const Operand& operand, int64_t offset,
                                            const Chunk& chunk, float (&v)[L::kWidth]) {
  if constexpr (std::is_same_v<T, void>) {
    load_operand<L>(operand, offset, chunk, v);
  } else {
    const T* const base = static_cast<const T*>(operand.data) + offset + chunk.first();
    FD_UNROLL
    for (int k = 0; k < L::kWidth; ++k) v[k] = 0.0f;
    if constexpr (sizeof(T) == 2) {
      if (chunk.left > 0) load_whole<L>(base, v);
    } else {
      FD_UNROLL
      for (int g = 0; g < L::kGroups; ++g) {
        float group[4] = {};
        if (chunk.left > 4 * g * L::kStride) {
          load_whole<Layout<4, false>>(base + 4 * g * L::kStride, group);
        }
        FD_UNROLL
        for (int k = 0; k < 4; ++k) v[4 * g + k] = group[k];
      }
    }
  }
}

template <class T, class L>
__device__ __forceinline__ void store_column(const Operand& operand, int64_t offset,
                                             const Chunk& chunk, const float (&v)[L::kWidth]) {
  if constexpr (std::is_same_v<T, void>) {
    store_operand<L>(operand, offset, chunk, v);
  } else {
    T* const base = static_cast<T*>(operand.data) + offset + chunk.first();
    if constexpr (sizeof(T) == 2) {
      if (chunk.left > 0) store_whole<L>(base, v);
    } else {
      FD_UNROLL
      for (int g = 0; g < L::kGroups; ++g) {
        const float group[4] = {v[4 * g], v[4 * g + 1], v[4 * g + 2], v[4 * g + 3]};
        if (chunk.left > 4 * g * L::kStride) {
          store_whole<Layout<4, false>>(base + 4 * g * L::kStride, group);
        }
      }
    }
  }
}

// The columns of a chunk, as far as they are used.
template <class S>
struct LossColumns {
  using L = typename S::L;
  static constexpr int kWidth = L::kWidth;
  using Values = float[kWidth];

  const LossParams& p;
  const LossFacts& f;
  const LossSample& sample;
  Values x, y, o, z, v;
  Values unclamped;

  __device__ __forceinline__ float c(int k) const {
    const float value = unclamped[k], low = sample[kLossLow], high = sample[kLossHigh];
    return value < low ? low : (value > high ? high : value);
  }

  // made_dtype: of the x that is made. Where store_made it is also stored.
  __device__ __forceinline__ void read(const LossUse& use, uint32_t b, const Chunk& chunk,
                                       DType made_dtype, bool store_made) {
    using X = typename S::X;
    using O = typename S::O;
    const int64_t offset = b * p.n, model_offset = f.learned ? 2 * offset : offset;
    if (use.x) load_column<X, L>(p.x, offset, chunk, x);
    if (use.y) load_column<X, L>(p.y, offset, chunk, y);
    if (use.o) {
      load_column<O, L>(p.model_output[0], model_offset, chunk, o);
      if (f.models == 2) {
        Values conditional;
        load_column<O, L>(p.model_output[1], model_offset, chunk, conditional);
        FD_UNROLL
        for (int k = 0; k < kWidth; ++k) o[k] = o[k] + sample.guidance * (conditional[k] - o[k]);
      }
    }
    if (use.v) load_column<O, L>(p.model_output[f.models - 1], model_offset + p.n, chunk, v);
    if (use.z) {
      if (f.seeded) {
        FD_UNROLL
        for (int g = 0; g < L::kGroups; ++g) {
          normal_block(f.fast, sample.draw, chunk.block + g * L::kStride, z + 4 * g);
          round_group(p.noise_dtype, z + 4 * g);
        }
      } else {
        load_column<X, L>(p.noise, offset, chunk, z);
      }
    }
    if (use.c) {
      FD_UNROLL
      for (int k = 0; k < kWidth; ++k) {
        float sum = kNegativeZero;
        if (f.clamp & 1) sum = sum + sample[kClampY] * y[k];
        if (f.clamp & 2) sum = sum + sample[kClampO] * o[k];
        unclamped[k] = sum;
      }
    }
    if (!f.makes) return;
    FD_UNROLL
    for (int k = 0; k < kWidth; ++k) {
      float sigma = sample[kSigma];
      if (f.learned) {
        sigma = sigma * learned_scale<Scalar>(v[k], sample[kLogScaleLow], sample[kLogScaleHigh]);
      }
      x[k] = -mean(f.bound & ~1, k) + sigma * z[k];
    }
    if (store_made) store_column<X, L>(p.made, offset, chunk, x);
    FD_UNROLL
    for (int g = 0; g < L::kGroups; ++g) round_group(made_dtype, x + 4 * g);
  }

  __device__ __forceinline__ float mean(int mask, int k) const {
    float sum = kNegativeZero;
    if (mask & 1) sum = sum + sample[kBoundX] * x[k];
    if (mask & 2) sum = sum + sample[kBoundY] * y[k];
    if (mask & 4) sum = sum + sample[kBoundO] * o[k];
    if (mask & 8) sum = sum + sample[kBoundC] * c(k);
    return sum;
  }

  __device__ __forceinline__ void error(Values& e) const {
    FD_UNROLL
    for (int k = 0; k < kWidth; ++k) {
      float sum = kNegativeZero;
      if (f.error & 1) sum = sum + sample[kErrorX] * x[k];
      if (f.error & 2) sum = sum + sample[kErrorY] * y[k];
      if (f.error & 4) sum = sum + sample[kErrorO] * o[k];
      if (f.error & 8) sum = sum + sample[kErrorC] * c(k);
      if (f.error & 16) sum = sum + sample[kErrorZ] * z[k];
      e[k] = sum;
    }
  }

  __device__ __forceinline__ void deviation(Values& d) const {
    FD_UNROLL
    for (int k = 0; k < kWidth; ++k) d[k] = mean(f.bound, k);
  }
};

// Calls action(x[k], d[k], v[k]) for every k, which may change d[k] and v[k]: what it does is there
// once and not kWidth times, and the arrays, turned by one each time, stay in registers.
template <int kWidth, class Action>
__device__ __forceinline__ void in_turn(float (&x)[kWidth], float (&d)[kWidth], float (&v)[kWidth],
                                        Action action) {
  FD_NO_UNROLL
  for (int turn = 0; turn < kWidth; ++turn) {
    const float first_x = x[0];
    float first_d = d[0], first_v = v[0];
    action(first_x, first_d, first_v);
    FD_UNROLL
    for (int k = 0; k + 1 < kWidth; ++k) x[k] = x[k + 1], d[k] = d[k + 1], v[k] = v[k + 1];
    x[kWidth - 1] = first_x, d[kWidth - 1] = first_d, v[kWidth - 1] = first_v;
  }
}

// Calls action(x[k], d[k], v[k]) likewise, of a bound. The likelihood, which few samples have,
// would be most of the kernel otherwise.
template <BoundKind kKind, int kWidth, class Action>
__device__ __forceinline__ void each_bound(float (&x)[kWidth], float (&d)[kWidth],
                                           float (&v)[kWidth], Action action) {
  if constexpr (kKind == BoundKind::kDiscretized) {
    in_turn(x, d, v, action);
  } else {
    FD_UNROLL
    for (int k = 0; k < kWidth; ++k) action(x[k], d[k], v[k]);
  }
}

// Calls action with the number of f.rho as a type.
template <class Action>
__device__ __forceinline__ void with_rho(int rho, Action action) {
  if (rho == kSquare) action(std::integral_constant<int, kSquare>());
  if (rho == kAbs) action(std::integral_constant<int, kAbs>());
  if (rho == kHuber) action(std::integral_constant<int, kHuber>());
  if (rho == kPseudoHuber) action(std::integral_constant<int, kPseudoHuber>());
}

// Calls action with the BoundKind of the sample, and whether its variance is learned, as types.
template <class Action>
__device__ __forceinline__ void with_bound(const LossFacts& f, const LossSample& sample,
                                           Action action) {
  const auto with_kind = [&](auto kind) {
    if (f.learned) {
      action(kind, std::true_type());
    } else {
      action(kind, std::false_type());
    }
  };
  if (f.density) {
    with_kind(std::integral_constant<BoundKind, BoundKind::kDensity>());
  } else if (sample.bound.discretized) {
    with_kind(std::integral_constant<BoundKind, BoundKind::kDiscretized>());
  } else {
    with_kind(std::integral_constant<BoundKind, BoundKind::kClosed>());
  }
}

}  // namespace fastdiff
