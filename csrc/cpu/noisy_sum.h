// The most common step, q_sample's and DDPM's: one float32 output whose last term is float32 noise
// made here, everything else float32 in memory. The noise goes from the registers in which it is
// made straight into the sum, and the loads and stores of the sum hide behind the arithmetic of the
// noise: 3 to 6 % faster than block by block.
#pragma once

#include "randn.h"
#include "sums.h"

namespace fastdiff::FASTDIFF_ISA {

static_assert(Group<float>::kSize % kRun == 0, "whole groups are whole runs");

using NoisySum = void (*)(const Sum<float>& row, const Sum<float>& clamped,
                          const Clamp<float>& clamp, const Draw& draw, uint32_t first_block,
                          int64_t count, float* target);

template <int kTerms>
struct Terms {
  const float* source[kTerms];
  float a[kTerms];

  explicit Terms(const Sum<float>& sum) {
#pragma GCC unroll 4
    for (int k = 0; k < kTerms; ++k) {
      source[k] = reinterpret_cast<const float*>(sum.terms[k].source->data);
      a[k] = sum.terms[k].coefficient;
    }
  }
};

// kTerms terms before the noise; with kClampTerms, the last of them is the clamp node of so many
// terms.
template <int kTerms, int kClampTerms, bool kStream>
__attribute__((noinline)) void noisy_sum(const Sum<float>& row, const Sum<float>& clamped,
                                         const Clamp<float>& clamp, const Draw& draw,
                                         uint32_t first_block, int64_t count, float* target) {
  using F = Lanes::F;
  const Terms<kTerms> terms(row);
  const Terms<kClampTerms == 0 ? 1 : kClampTerms> inner(kClampTerms == 0 ? row : clamped);
  const float noise = row.terms[kTerms].coefficient;
  const Clamp<float> bounds = clamp;
  for (int64_t run = 0; run < count; run += kRun) {
    const auto finish = [&](int first, F(&z)[4]) {
      Lanes::interleave(z);
#pragma GCC unroll 4
      for (int u = 0; u < 4; ++u) {
        const int64_t i = run + first + u * Lanes::kCount;
        F acc;
#pragma GCC unroll 4
        for (int k = 0; k < kTerms; ++k) {
          F value;
          if (kClampTerms > 0 && k == kTerms - 1) {
            value = inner.a[0] * load_vector<F>(inner.source[0] + i);
            if constexpr (kClampTerms == 2)
              value = value + inner.a[1] * load_vector<F>(inner.source[1] + i);
            value = bounds(value);
          } else {
            value = load_vector<F>(terms.source[k] + i);
          }
          acc = k == 0 ? terms.a[k] * value : acc + terms.a[k] * value;
        }
        acc = acc + noise * z[u];
        if constexpr (kStream)
          stream_vector(target + i, acc);
        else
          store_vector(target + i, acc);
      }
    };
    each_quad<float>(draw, first_block + static_cast<uint32_t>(run / 4), finish);
  }
}

template <bool kStream>
NoisySum noisy_sum_of(int terms, int clamp_terms) {
  static constexpr NoisySum kSums[3][3] = {
      {noisy_sum<1, 0, kStream>, noisy_sum<1, 1, kStream>, noisy_sum<1, 2, kStream>},
      {noisy_sum<2, 0, kStream>, noisy_sum<2, 1, kStream>, noisy_sum<2, 2, kStream>},
      {noisy_sum<3, 0, kStream>, noisy_sum<3, 1, kStream>, noisy_sum<3, 2, kStream>}};
  return terms >= 1 && terms <= 3 && clamp_terms <= 2 ? kSums[terms - 1][clamp_terms] : nullptr;
}

inline bool plain_floats(const Sum<float>& sum, int count) {
  for (int k = 0; k < count; ++k) {
    const Term<float>& term = sum.terms[k];
    if (term.base || term.scale || term.source->dtype != DType::f32) return false;
  }
  return true;
}

// For a row whose last term is `noise` and whose clamp node, if any, is the one before. Null where
// the step is of another form.
inline NoisySum noisy_sum_for(const Sum<float>& row, const Place* noise, const Sum<float>& clamped,
                              const Place* clamp_node, bool stream) {
  const int terms = row.count - 1;
  if (terms < 1 || row.terms[terms].source != noise || row.terms[terms].scale) return nullptr;
  const bool clamps = row.terms[terms - 1].source == clamp_node;
  if (!plain_floats(row, terms) || (clamps && !plain_floats(clamped, clamped.count)))
    return nullptr;
  for (int k = 0; k < clamped.count; ++k)
    if (clamps && clamped.terms[k].source == noise) return nullptr;
  if (clamps && clamped.count == 0) return nullptr;
  const int clamp_terms = clamps ? clamped.count : 0;
  return stream ? noisy_sum_of<true>(terms, clamp_terms) : noisy_sum_of<false>(terms, clamp_terms);
}

}  // namespace fastdiff::FASTDIFF_ISA
