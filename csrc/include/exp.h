// exp by the fixed polynomials of fastdiff/ops/exp.py, over a lane policy as in noise.h.
// x is clamped (float32 to [-87, 88], float64 to [-708, 709]); NaN passes.
#pragma once

#include "noise.h"

namespace fastdiff {

template <class L>
FD_HD typename L::F exp_f32(typename L::F x) {
  using F = typename L::F;
  x = x < -87.0f ? L::splat(-87.0f) : (x > 88.0f ? L::splat(88.0f) : x);
  const F shifted = x * 0x1.715476p+0f + 12582912.0f;
  const F k = shifted - 12582912.0f;
  F r = x + k * -0x1.62e400p-1f;
  r = r + k * -0x1.7f7d1cp-20f;
  const F p = horner(r, 1.0f, 1.0f, 0.5f, 1.0f / 6.0f, 1.0f / 24.0f, 1.0f / 120.0f, 1.0f / 720.0f,
                     1.0f / 5040.0f);
  return p * L::from_bits((L::bits(shifted) + 127u) << 23);
}

// Here L::F is double and L::U its 64 bits.
template <class L>
FD_HD typename L::F exp_f64(typename L::F x) {
  using F = typename L::F;
  x = x < -708.0 ? L::splat(-708.0) : (x > 709.0 ? L::splat(709.0) : x);
  const F shifted = x * 0x1.71547652b82fep+0 + 6755399441055744.0;
  const F k = shifted - 6755399441055744.0;
  F r = x + k * -0x1.62e42fee00000p-1;
  r = r + k * -0x1.a39ef35793c76p-33;
  const F p =
      horner(r, 1.0, 1.0, 1.0 / 2, 1.0 / 6, 1.0 / 24, 1.0 / 120, 1.0 / 720, 1.0 / 5040, 1.0 / 40320,
             1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800);
  return p * L::from_bits((L::bits(shifted) + 1023u) << 52);
}

// Of either type.
template <class L>
FD_HD typename L::F exp_of(typename L::F x) {
  if constexpr (std::is_same_v<typename L::T, double>)
    return exp_f64<L>(x);
  else
    return exp_f32<L>(x);
}

// What a learned variance scales the noise by: v in [-1, 1] between the logs of its bounds.
template <class L>
FD_HD typename L::F learned_scale(typename L::F v, typename L::T log_low, typename L::T log_high) {
  using T = typename L::T;
  const typename L::F f = v * static_cast<T>(0.5) + static_cast<T>(0.5);
  return exp_of<L>(f * log_high + (static_cast<T>(1) - f) * log_low);
}

}  // namespace fastdiff
