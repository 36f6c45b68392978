// The functions of a bit in fastdiff/ops/bits.py, over a lane policy as in loss.h. M is what a
// comparison of L::F gives: bool, or a register of masks.
#pragma once

#include "loss.h"

namespace fastdiff {

// A row of the table of bits_bound.
enum BitsColumn { kPosterior = 0, kRest = 4, kEntropy = 8, kBitsScale = 12, kBitsColumns = 13 };

template <class L>
struct Logistic {
  typename L::F e, a, b;  // exp(-|l|), (1 + e) (1 - s(l)), (1 + e) s(l)
};

template <class L>
FD_HD Logistic<L> logistic(typename L::F logit) {
  using F = typename L::F;
  using T = typename L::T;
  const F e = exp_of<L>(-absolute<L>(logit)), one = L::splat(static_cast<T>(1));
  return {e, logit > static_cast<T>(0) ? e : one, logit < static_cast<T>(0) ? e : one};
}

// Entry 2 x + y of four.
template <class L, class M>
FD_HD typename L::F by_bits(const typename L::T* entries, M x, M y) {
  using F = typename L::F;
  const F set = y ? L::splat(entries[3]) : L::splat(entries[2]);
  const F unset = y ? L::splat(entries[1]) : L::splat(entries[0]);
  return x ? set : unset;
}

// Entry 2 x + kOther of four.
template <class L, int kOther, class M>
FD_HD typename L::F by_bit(const typename L::T* entries, M x) {
  return x ? L::splat(entries[2 + kOther]) : L::splat(entries[kOther]);
}

template <class L, class M>
FD_HD typename L::F bit_probability(typename L::F logit, M x, const typename L::T* row) {
  using F = typename L::F;
  const Logistic<L> s = logistic<L>(logit);
  const F zero = by_bit<L, 0>(row, x), one = by_bit<L, 1>(row, x);
  return (zero * s.a + one * s.b) / (s.e + static_cast<typename L::T>(1));
}

// What log takes 0 for; a quotient by it is finite.
template <class L>
FD_HD typename L::F at_least_normal(typename L::F x) {
  constexpr bool kDouble = std::is_same_v<typename L::T, double>;
  const auto least = static_cast<typename L::T>(kDouble ? 0x1p-1022 : 0x1p-126);
  return x < least ? L::splat(least) : x;
}

// (1 + e) times the probability of a set bit and of one that is not.
template <class L>
struct BitOdds {
  typename L::F one, other;
};

template <class L, class M>
FD_HD BitOdds<L> bit_odds(const Logistic<L>& s, M x_t, const typename L::T* row) {
  using F = typename L::F;
  const F one =
      by_bit<L, 0>(row + kPosterior, x_t) * s.a + by_bit<L, 1>(row + kPosterior, x_t) * s.b;
  const F other = by_bit<L, 0>(row + kRest, x_t) * s.a + by_bit<L, 1>(row + kRest, x_t) * s.b;
  return {at_least_normal<L>(one), at_least_normal<L>(other)};
}

template <class L, bool kMixture, class M>
FD_HD typename L::F bit_divergence(typename L::F logit, M x_t, M x_start,
                                   const typename L::T* row) {
  using F = typename L::F;
  using T = typename L::T;
  const F q = by_bits<L>(row + kPosterior, x_t, x_start);
  const F entropy = by_bits<L>(row + kEntropy, x_t, x_start);
  if constexpr (!kMixture) return softplus<L>(logit) - q * logit - entropy;
  const Logistic<L> s = logistic<L>(logit);
  const F rest = by_bits<L>(row + kRest, x_t, x_start);
  const BitOdds<L> p = bit_odds<L>(s, x_t, row);
  return log_of<L>(s.e + static_cast<T>(1)) - q * log_of<L>(p.one) - rest * log_of<L>(p.other) -
         entropy;
}

// Its derivative by the logit.
template <class L, bool kMixture, class M>
FD_HD typename L::F bit_divergence_slope(typename L::F logit, M x_t, M x_start,
                                         const typename L::T* row) {
  using F = typename L::F;
  using T = typename L::T;
  const F q = by_bits<L>(row + kPosterior, x_t, x_start);
  const Logistic<L> s = logistic<L>(logit);
  if constexpr (!kMixture) return s.b / (s.e + static_cast<T>(1)) - q;
  const F rest = by_bits<L>(row + kRest, x_t, x_start);
  const BitOdds<L> p = bit_odds<L>(s, x_t, row);
  const F spread = by_bit<L, 1>(row + kPosterior, x_t) - by_bit<L, 0>(row + kPosterior, x_t);
  return (rest / p.other - q / p.one) * spread * s.e / (s.e + static_cast<T>(1));
}

}  // namespace fastdiff
