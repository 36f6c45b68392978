// log by the fixed polynomials of fastdiff/ops/log.py, over a lane policy as in noise.h.
// x below the smallest normal number counts as that; NaN, infinities and negative x give NaN.
#pragma once

#include "noise.h"

namespace fastdiff {

template <class L>
FD_HD typename L::F log_f32(typename L::F x) {
  using F = typename L::F;
  const F normal = x < 0x1p-126f ? L::splat(0x1p-126f) : x;
  const F value = minus_twice_log<L>(normal) * -0.5f;
  return (x >= 0.0f ? value : L::splat(bit_cast<float>(0x7fc00000u))) + (x - x);
}

// Here L::F is double and L::U its 64 bits.
template <class L>
FD_HD typename L::F log_f64(typename L::F x) {
  using F = typename L::F;
  using U = typename L::U;
  constexpr uint64_t kFirst = 0x3fe6a09e667f3bcdu;  // sqrt(1/2)
  const F normal = x < 0x1p-1022 ? L::splat(0x1p-1022) : x;
  const U ix = L::bits(normal) - kFirst;
  // The exponent k, which may be negative, as the low bits of 2^52 + 1024 + k.
  const U exponent = (ix + (uint64_t{1024} << 52)) >> 52;
  const F k = L::from_bits(exponent + 0x4330000000000000u) - (0x1p52 + 1024.0);
  const F m = L::from_bits((ix & 0xfffffffffffffu) + kFirst);
  const F s = (m - 1.0) / (m + 1.0);
  const F p = horner(s * s, 2.0, 2.0 / 3, 2.0 / 5, 2.0 / 7, 2.0 / 9, 2.0 / 11, 2.0 / 13, 2.0 / 15,
                     2.0 / 17, 2.0 / 19, 2.0 / 21);
  const F value = k * 0x1.62e42fee00000p-1 + (p * s + k * 0x1.a39ef35793c76p-33);
  return (x >= 0.0 ? value : L::splat(bit_cast<double>(uint64_t{0x7ff8} << 48))) + (x - x);
}

// Of either type.
template <class L>
FD_HD typename L::F log_of(typename L::F x) {
  if constexpr (std::is_same_v<typename L::T, double>)
    return log_f64<L>(x);
  else
    return log_f32<L>(x);
}

}  // namespace fastdiff
