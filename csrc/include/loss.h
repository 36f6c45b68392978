// The functions of an element in fastdiff/ops/loss_terms.py and their slopes, over a lane policy as
// in noise.h: L::F is what lanes hold, L::T one of them. Constants are rounded to T once; every
// operation below stands in the order of the definition, which the bits depend on.
#pragma once

#include "exp.h"
#include "log.h"

namespace fastdiff {

// A row of the table: COLUMNS of fastdiff/ops/loss.py.
enum LossColumn {
  kLossLow,
  kLossHigh,
  kClampY,
  kClampO,
  kErrorX,
  kErrorY,
  kErrorO,
  kErrorC,
  kErrorZ,
  kErrorScale,
  kErrorOffset,
  kDelta,
  kBoundX,
  kBoundY,
  kBoundO,
  kBoundC,
  kLogVariance0,
  kLogVariance1,
  kTrueLogVariance,
  kTrueInverseVariance,
  kHalfInverseVariance,
  kInverseStd,
  kDiscretized,
  kFloor,
  kSigma,
  kLogScaleLow,
  kLogScaleHigh,
  kBoundScale,
  kBoundOffset,
  kXStartScale,
  kLossColumns
};

enum Rho { kSquare, kAbs, kHuber, kPseudoHuber };
enum LossTerm { kErrorTerm = 1, kBoundTerm = 2, kXStartTerm = 4 };  // bits of LossParams::terms

constexpr double kHalfBin = 1.0 / 255.0;
constexpr double kFirstBin = -0.999, kLastBin = 0.999;
// CDF of the normal: 1 / (1 + exp(-a)), a = p (kCdf1 + kCdf3 p^2).
constexpr double kCdf1 = 0x1.9884533d43651p+0;  // 2 sqrt(2 / pi)
constexpr double kCdf3 = kCdf1 * 0.044715;

template <class L>
FD_HD typename L::F absolute(typename L::F x) {
  if constexpr (std::is_same_v<typename L::T, double>)
    return L::from_bits(L::bits(x) & 0x7fffffffffffffffu);
  else
    return L::from_bits(L::bits(x) & 0x7fffffffu);
}

// ---- rho(e). kRho is static: one kernel has one rho.

template <class L, int kRho>
FD_HD typename L::F rho_value(typename L::F e, typename L::T delta) {
  using F = typename L::F;
  using T = typename L::T;
  if constexpr (kRho == kSquare) return e * e;
  if constexpr (kRho == kAbs) return absolute<L>(e);
  if constexpr (kRho == kHuber) {
    const F a = absolute<L>(e);
    const F inner = e * e * static_cast<T>(0.5);
    const F outer = delta * (a - delta * static_cast<T>(0.5));
    return a < delta ? inner : outer;
  }
  const F e2 = e * e;
  return e2 / (L::sqrt(e2 + delta * delta) + delta);
}

template <class L, int kRho>
FD_HD typename L::F rho_slope(typename L::F e, typename L::T delta) {
  using F = typename L::F;
  using T = typename L::T;
  if constexpr (kRho == kSquare) return e + e;
  if constexpr (kRho == kAbs) {
    const F minus = e < static_cast<T>(0) ? L::splat(static_cast<T>(-1)) : e;  // NaN and 0 pass
    return e > static_cast<T>(0) ? L::splat(static_cast<T>(1)) : minus;
  }
  if constexpr (kRho == kHuber) {
    const F at_most = e > delta ? L::splat(delta) : e;
    return e < -delta ? L::splat(-delta) : at_most;
  }
  return e / L::sqrt(e * e + delta * delta);
}

// ---- parts of the discretized likelihood. Those with two arguments take e = exp(-|x|) or exp(-w),
// which several of them share.

template <class L>
FD_HD typename L::F exp_minus(typename L::F magnitude) {
  return exp_of<L>(-magnitude);
}

template <class L>
FD_HD typename L::F softplus(typename L::F x, typename L::F e) {
  using F = typename L::F;
  using T = typename L::T;
  const F positive = x > static_cast<T>(0) ? x : L::splat(static_cast<T>(0));
  return positive + log_of<L>(e + static_cast<T>(1));
}
template <class L>
FD_HD typename L::F softplus(typename L::F x) {
  return softplus<L>(x, exp_minus<L>(absolute<L>(x)));
}

template <class L>
FD_HD typename L::F sigmoid(typename L::F x, typename L::F e) {
  using T = typename L::T;
  return (x < static_cast<T>(0) ? e : L::splat(static_cast<T>(1))) / (e + static_cast<T>(1));
}

// log(1 - exp(-w)), w > 0: below 1 log(w) and a series of Bernoulli numbers B_2k / (2k (2k)!).
template <class L>
FD_HD typename L::F log_one_minus_exp(typename L::F w, typename L::F e) {
  using F = typename L::F;
  using T = typename L::T;
  const F w2 = w * w;
  F series;
  if constexpr (std::is_same_v<T, double>)
    series = horner(w2, 1.0 / 6 / 4, -1.0 / 30 / 96, 1.0 / 42 / 4320, -1.0 / 30 / 322560,
                    5.0 / 66 / 36288000, -691.0 / 2730 / 5748019200, 7.0 / 6 / 1220496076800,
                    -3617.0 / 510 / 334764638208000, 43867.0 / 798 / 115242726703104000);
  else
    series = horner(w2, static_cast<T>(1.0 / 6 / 4), static_cast<T>(-1.0 / 30 / 96),
                    static_cast<T>(1.0 / 42 / 4320), static_cast<T>(-1.0 / 30 / 322560));
  const auto small = w < static_cast<T>(1);
  const F argument = small ? w : static_cast<T>(1) - e;
  const F rest = (series * w - static_cast<T>(0.5)) * w;
  return log_of<L>(argument) + (small ? rest : L::splat(static_cast<T>(0)));
}

// 1 / (exp(w) - 1), w > 0, its derivative: below 1 by the series of (exp(w) - 1) / w.
template <class L>
FD_HD typename L::F inverse_expm1(typename L::F w, typename L::F e) {
  using F = typename L::F;
  using T = typename L::T;
  F series;
  if constexpr (std::is_same_v<T, double>)
    series = horner(w, 1.0, 1.0 / 2, 1.0 / 6, 1.0 / 24, 1.0 / 120, 1.0 / 720, 1.0 / 5040,
                    1.0 / 40320, 1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600,
                    1.0 / 6227020800, 1.0 / 87178291200, 1.0 / 1307674368000, 1.0 / 20922789888000);
  else
    series = horner(w, static_cast<T>(1.0), static_cast<T>(1.0 / 2), static_cast<T>(1.0 / 6),
                    static_cast<T>(1.0 / 24), static_cast<T>(1.0 / 120), static_cast<T>(1.0 / 720),
                    static_cast<T>(1.0 / 5040), static_cast<T>(1.0 / 40320),
                    static_cast<T>(1.0 / 362880), static_cast<T>(1.0 / 3628800));
  const auto small = w < static_cast<T>(1);
  return (small ? L::splat(static_cast<T>(1)) : e) / (small ? series * w : static_cast<T>(1) - e);
}

// A bin's upper and lower end in standard deviations, the CDF's arguments there, p^2 + p m + m^2
// and the arguments' difference.
template <class L>
struct Bin {
  using F = typename L::F;
  F p, m, p2, m2, upper, lower, squares, width;

  static FD_HD Bin of(F d, F s) {
    using T = typename L::T;
    constexpr T kHalf = static_cast<T>(kHalfBin);
    constexpr T k1 = static_cast<T>(kCdf1), k3 = static_cast<T>(kCdf3);
    constexpr T kWidth1 = static_cast<T>(2.0 * kHalfBin * kCdf1);
    constexpr T kWidth3 = static_cast<T>(2.0 * kHalfBin * kCdf3);
    Bin bin;
    bin.p = s * (d + kHalf);
    bin.m = s * (d - kHalf);
    bin.p2 = bin.p * bin.p;
    bin.m2 = bin.m * bin.m;
    bin.upper = bin.p * (bin.p2 * k3 + k1);
    bin.lower = bin.m * (bin.m2 * k3 + k1);
    bin.squares = bin.p2 + bin.p * bin.m + bin.m2;
    bin.width = s * (bin.squares * kWidth3 + kWidth1);
    return bin;
  }
};

// exp(-|.|) of a bin's upper, lower and width.
template <class L>
struct BinExp {
  typename L::F upper, lower, width;

  static FD_HD BinExp of(const Bin<L>& bin) {
    return {exp_minus<L>(absolute<L>(bin.upper)), exp_minus<L>(absolute<L>(bin.lower)),
            exp_minus<L>(bin.width)};
  }
};

// From the three terms: softplus(-upper), softplus(lower) and log(1 - exp(-width)).
template <class L>
FD_HD typename L::F discretized_nll(typename L::F x, typename L::F below, typename L::F above,
                                    typename L::F inside, typename L::T floor) {
  using F = typename L::F;
  using T = typename L::T;
  const F inner = below + above - inside;
  const F not_first = x > static_cast<T>(kLastBin) ? above : inner;
  const F value = x < static_cast<T>(kFirstBin) ? below : not_first;
  return value > floor ? L::splat(floor) : value;
}
template <class L>
FD_HD typename L::F discretized_nll(typename L::F x, const Bin<L>& bin, const BinExp<L>& e,
                                    typename L::T floor) {
  return discretized_nll<L>(x, softplus<L>(-bin.upper, e.upper), softplus<L>(bin.lower, e.lower),
                            log_one_minus_exp<L>(bin.width, e.width), floor);
}

// Derivatives of a bound by d and by the log variance.
template <class L>
struct BoundSlopes {
  typename L::F by_d, by_l;
};

// nll: the likelihood itself, which has none where it is at its floor.
template <class L>
FD_HD BoundSlopes<L> discretized_nll_slopes(typename L::F x, const Bin<L>& bin, const BinExp<L>& e,
                                            typename L::F s, typename L::F nll,
                                            typename L::T floor) {
  using F = typename L::F;
  using T = typename L::T;
  constexpr T k1 = static_cast<T>(kCdf1), kSlope3 = static_cast<T>(3.0 * kCdf3);
  constexpr T kByD3 = static_cast<T>(6.0 * kHalfBin * kCdf3);
  constexpr T kByS1 = static_cast<T>(2.0 * kHalfBin * kCdf1);
  const F below = -sigmoid<L>(-bin.upper, e.upper) * (bin.p2 * kSlope3 + k1);
  const F above = sigmoid<L>(bin.lower, e.lower) * (bin.m2 * kSlope3 + k1);
  const F q = inverse_expm1<L>(bin.width, e.width) * s;
  const F width_by_d = (bin.p + bin.m) * s * kByD3;
  const F width_by_s = bin.squares * kByD3 + kByS1;
  const F inner_d = (below + above) * s - q * width_by_d;
  const F inner_l = below * bin.p + above * bin.m - q * width_by_s;
  const auto first = x<static_cast<T>(kFirstBin), last = x> static_cast<T>(kLastBin);
  const F first_d = below * s, last_d = above * s, first_l = below * bin.p, last_l = above * bin.m;
  const F not_first_d = last ? last_d : inner_d, not_first_l = last ? last_l : inner_l;
  const F by_d = first ? first_d : not_first_d;
  const F by_l = (first ? first_l : not_first_l) * static_cast<T>(-0.5);
  const auto capped = nll >= floor;
  const F zero = L::splat(static_cast<T>(0));
  return {capped ? zero : by_d, capped ? zero : by_l};
}

// ---- the bound f(d, l)

// What a row says about the bound of its sample.
template <class T>
struct BoundRow {
  T l0, l1, true_log_variance, true_inverse_variance, half_inverse_variance, inverse_std, floor;
  bool discretized;  // NaN, of a row outside the table, counts

  // entry(column) is an element of the row.
  template <class Entry>
  static FD_HD BoundRow of(const Entry& entry) {
    return {entry(kLogVariance0),
            entry(kLogVariance1),
            entry(kTrueLogVariance),
            entry(kTrueInverseVariance),
            entry(kHalfInverseVariance),
            entry(kInverseStd),
            entry(kFloor),
            entry(kDiscretized) != static_cast<T>(0)};
  }
};

enum class BoundKind { kClosed, kDiscretized, kDensity };

// 1 / (standard deviation) of the model.
template <class L, bool kLearned>
FD_HD typename L::F inverse_std(const BoundRow<typename L::T>& row, typename L::F v) {
  if constexpr (kLearned)
    return exp_of<L>((row.l0 + row.l1 * v) * static_cast<typename L::T>(-0.5));
  else
    return L::splat(row.inverse_std);
}

// v is used only where the variance is learned, x only where the kind is kDiscretized.
template <class L, BoundKind kKind, bool kLearned>
FD_HD typename L::F bound_value(const BoundRow<typename L::T>& row, typename L::F x,
                                typename L::F d, typename L::F v) {
  using F = typename L::F;
  using T = typename L::T;
  constexpr T kHalf = static_cast<T>(0.5);
  if constexpr (kKind == BoundKind::kDiscretized) {
    const Bin<L> bin = Bin<L>::of(d, inverse_std<L, kLearned>(row, v));
    return discretized_nll<L>(x, bin, BinExp<L>::of(bin), row.floor);
  } else if constexpr (!kLearned) {
    const F closed = d * d * row.half_inverse_variance;
    return kKind == BoundKind::kDensity ? -closed : closed;
  } else {
    const F log_variance = row.l0 + row.l1 * v;
    if constexpr (kKind == BoundKind::kDensity)
      return (log_variance + d * d * exp_of<L>(-log_variance)) * -kHalf;
    const F difference = log_variance - row.true_log_variance;
    const F ratio = exp_of<L>(-difference);
    const F distance = d * d * (ratio * row.true_inverse_variance);
    return (difference - static_cast<T>(1) + ratio + distance) * kHalf;
  }
}

// by_l means nothing where the variance is fixed.
template <class L, BoundKind kKind, bool kLearned>
FD_HD BoundSlopes<L> bound_slopes(const BoundRow<typename L::T>& row, typename L::F x,
                                  typename L::F d, typename L::F v) {
  using F = typename L::F;
  using T = typename L::T;
  constexpr T kHalf = static_cast<T>(0.5), kOne = static_cast<T>(1);
  if constexpr (kKind == BoundKind::kDiscretized) {
    const F s = inverse_std<L, kLearned>(row, v);
    const Bin<L> bin = Bin<L>::of(d, s);
    const BinExp<L> e = BinExp<L>::of(bin);
    return discretized_nll_slopes<L>(x, bin, e, s, discretized_nll<L>(x, bin, e, row.floor),
                                     row.floor);
  } else if constexpr (!kLearned) {
    const F closed = (d + d) * row.half_inverse_variance;
    return {kKind == BoundKind::kDensity ? -closed : closed, L::splat(static_cast<T>(0))};
  } else {
    const F log_variance = row.l0 + row.l1 * v;
    if constexpr (kKind == BoundKind::kDensity) {
      const F by_d = d * exp_of<L>(-log_variance);
      return {-by_d, (d * by_d - kOne) * kHalf};
    }
    const F ratio = exp_of<L>(-(log_variance - row.true_log_variance));
    const F by_d = d * (ratio * row.true_inverse_variance);
    return {by_d, (kOne - ratio - d * by_d) * kHalf};
  }
}

// ---- the derivative by o of one term: slope * (inside, or where the clamp is at work at_bound)

template <class T>
struct GradFactor {
  bool used, by_clamp;  // by_clamp: the two differ
  T inside, at_bound;

  // weight: (gradient of the result) * scale. direct: of the term's argument by o; by_c: by c,
  // which depends on o by p_o. Either may not be there.
  static FD_HD GradFactor of(T weight, bool has_direct, T direct, bool has_by_c, T by_c, T p_o) {
    const T at_bound = has_direct ? weight * direct : static_cast<T>(0);
    const T through = by_c * p_o;
    const T inside = weight * (has_direct ? direct + through : through);
    return {has_direct || has_by_c, has_by_c, has_by_c ? inside : at_bound, at_bound};
  }
};

}  // namespace fastdiff
