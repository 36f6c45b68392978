// Gradients of losses by the model outputs (fastdiff/ops/loss.py) on the GPU: one pass, which reads
// what the loss reads, makes its noise again, and writes.
#pragma once

#include "loss_chunk.cuh"

namespace fastdiff {

// What a sample's gradient is made of; the same for all threads.
struct LossFactors {
  GradFactor<float> error, bound, x_start;
  float by_v;
  LossUse use;

  __device__ __forceinline__ LossFactors(const LossParams& p, const LossFacts& f,
                                         const LossRow& row, const LossSample& sample, uint32_t b) {
    const float* result = static_cast<const float*>(p.results_grad) + b;
    const bool through_c = f.clamp > 0 && f.clamp & 2;
    error = bound = x_start = {};
    by_v = 0.0f;
    bool learns = false;
    if (f.terms & kErrorTerm) {
      error = uniform_factor(__ldg(result) * row[kErrorScale], f.error & 4, sample[kErrorO],
                             through_c && f.error & 8, sample[kErrorC], sample[kClampO]);
      result += p.batch;
    }
    if (f.terms & kBoundTerm) {
      const float weight = __ldg(result) * row[kBoundScale];
      if (!f.frozen) {
        bound = uniform_factor(weight, f.bound & 4, sample[kBoundO], through_c && f.bound & 8,
                               sample[kBoundC], sample[kClampO]);
      }
      learns = f.learned;
      by_v = uniform(weight * sample[kLogVariance1]);
      result += p.batch;
    }
    if (f.terms & kXStartTerm && through_c) {
      x_start = uniform_factor(__ldg(result) * row[kXStartScale], false, 0.0f, true, -1.0f,
                               sample[kClampO]);
    }
    use = LossUse::of(f, error.used, bound.used || learns, x_start.used, learns,
                      sample.bound.discretized);
    // Where a value turns on the clamp being at work it has to be known.
    use.c = use.c || error.by_clamp || bound.by_clamp || x_start.by_clamp;
  }

  static __device__ __forceinline__ GradFactor<float> uniform_factor(float weight, bool has_direct,
                                                                     float direct, bool has_by_c,
                                                                     float by_c, float p_o) {
    GradFactor<float> factor =
        GradFactor<float>::of(weight, has_direct, direct, has_by_c, by_c, p_o);
    factor.inside = uniform(factor.inside);
    factor.at_bound = uniform(factor.at_bound);
    return factor;
  }
};

template <class S>
__device__ __forceinline__ void loss_grad_chunk(const LossParams& p, const LossFacts& f,
                                                const LossSample& sample,
                                                const LossFactors& factors, uint32_t b,
                                                const Chunk& chunk) {
  using L = typename S::L;
  using O = typename S::O;
  using Columns = LossColumns<S>;
  Columns columns{p, f, sample, {}, {}, {}, {}, {}, {}};
  columns.read(factors.use, b, chunk, DType::f32, false);
  typename Columns::Values by_o, slope;
  const auto add = [&](const GradFactor<float>& factor) {
    FD_UNROLL
    for (int k = 0; k < L::kWidth; ++k) {
      bool at_bound = false;
      if (factor.by_clamp) {
        const float c = columns.unclamped[k];
        at_bound = c < sample[kLossLow] || c > sample[kLossHigh];
      }
      by_o[k] = by_o[k] + slope[k] * (at_bound ? factor.at_bound : factor.inside);
    }
  };
  const bool used = factors.error.used || factors.bound.used || factors.x_start.used;
  FD_UNROLL
  for (int k = 0; k < L::kWidth; ++k) by_o[k] = used ? kNegativeZero : 0.0f;
  if (factors.use.e) {
    columns.error(slope);
    with_rho(f.rho, [&](auto rho) {
      FD_UNROLL
      for (int k = 0; k < L::kWidth; ++k) {
        slope[k] = rho_slope<Scalar, decltype(rho)::value>(slope[k], sample[kDelta]);
      }
    });
    add(factors.error);
  }
  if (factors.use.d) {
    columns.deviation(slope);
    // v becomes the derivative by the log variance.
    with_bound(f, sample, [&](auto kind, auto learned) {
      constexpr BoundKind kKind = decltype(kind)::value;
      constexpr bool kLearned = decltype(learned)::value;
      each_bound<kKind>(columns.x, slope, columns.v, [&](float x, float& d, float& v) {
        const BoundSlopes<Scalar> slopes =
            bound_slopes<Scalar, kKind, kLearned>(sample.bound, x, d, v);
        d = slopes.by_d;
        if constexpr (kLearned) v = slopes.by_l;
      });
    });
    if (factors.bound.used) add(factors.bound);
  }
  if (factors.use.x_start) {
    FD_UNROLL
    for (int k = 0; k < L::kWidth; ++k) {
      const float difference = columns.x[k] - columns.c(k);
      slope[k] = difference + difference;
    }
    add(factors.x_start);
  }
  const int64_t offset = b * p.n * (f.learned ? 2 : 1);
  if (f.models == 2) {
    FD_UNROLL
    for (int k = 0; k < L::kWidth; ++k) slope[k] = by_o[k] * (1.0f - sample.guidance);
    store_column<O, L>(p.grad[0], offset, chunk, slope);
    FD_UNROLL
    for (int k = 0; k < L::kWidth; ++k) {
      by_o[k] = by_o[k] * sample.guidance;
      slope[k] = 0.0f;
    }
    if (f.learned) store_column<O, L>(p.grad[0], offset + p.n, chunk, slope);
  }
  store_column<O, L>(p.grad[f.models - 1], offset, chunk, by_o);
  if (!f.learned) return;
  FD_UNROLL
  for (int k = 0; k < L::kWidth; ++k) {
    slope[k] = factors.use.v ? columns.v[k] * factors.by_v : 0.0f;
  }
  store_column<O, L>(p.grad[f.models - 1], offset + p.n, chunk, slope);
}

template <class S>
__global__ void __launch_bounds__(kThreads, S::kResident)
    loss_grad_kernel(const __grid_constant__ LossParams p, bool aligned) {
  using L = typename S::L;
  const uint32_t b = sample_index();
  if (b >= p.batch) return;
  const LossFacts f = S::facts(p);
  const LossRow row = LossRow::of(p, b);
  const LossSample sample(p, f, row, b);
  const LossFactors factors(p, f, row, sample, b);
  for_each_block<L>(p.n, [&](uint32_t block, uint32_t) {
    const int64_t left = p.n - static_cast<int64_t>(block) * 4;
    loss_grad_chunk<S>(p, f, sample, factors, b, {block, left, aligned && left >= L::kReach});
  });
}

}  // namespace fastdiff
