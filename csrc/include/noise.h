// The noise contract (fastdiff/noise.py): Philox4x32-10 words and the Box-Muller transform.
//
// Written once over a lane policy L, so that the same lines serve one element (CUDA threads, host
// checks) and a SIMD register of them (csrc/cpu/lanes.h). L names
//   W  carrier of a Philox word; its bits above 32 are unspecified    mulhilo, word
//   U  uint32 lanes   I  int32 lanes   F  float32 lanes               as_int, to_float, bits,
//                                                                      from_bits, sqrt, splat
// and its types have the operators of the scalar types (GCC vector extensions do). exp.h, log.h and
// loss.h ask for less: T, the type of one lane of F, which may be double, and of the above F, U,
// bits, from_bits, splat, sqrt, for float also I, as_int and to_float.
#pragma once

#include "portability.h"

#if !defined(__CUDA_ARCH__)
#include <cmath>
#endif

namespace fastdiff {

struct Scalar {
  using T = float;
  using W = uint32_t;
  using U = uint32_t;
  using I = int32_t;
  using F = float;

  static FD_HD W word(uint32_t value) { return value; }
  static FD_HD void mulhilo(W a, uint32_t m, W& hi, W& lo) {
#if defined(__CUDA_ARCH__)
    uint64_t product;  // spelled out: the compiler would also add the zero upper halves
    asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(m));
#else
    const uint64_t product = static_cast<uint64_t>(a) * m;
#endif
    hi = static_cast<uint32_t>(product >> 32);
    lo = static_cast<uint32_t>(product);
  }
  static FD_HD I as_int(U value) { return static_cast<int32_t>(value); }
  static FD_HD F to_float(I value) { return static_cast<float>(value); }
  static FD_HD U bits(F value) { return bit_cast<uint32_t>(value); }
  static FD_HD F from_bits(U value) { return bit_cast<float>(value); }
  static FD_HD F splat(float value) { return value; }
  static FD_HD F sqrt(F value) {
#if defined(__CUDA_ARCH__)
    return __fsqrt_rn(value);
#else
    return std::sqrt(value);
#endif
  }
};

constexpr int kRounds = 10;
constexpr uint32_t kMultiplier0 = 0xd2511f53u, kMultiplier1 = 0xcd9e8d57u;
constexpr uint32_t kWeyl0 = 0x9e3779b9u, kWeyl1 = 0xbb67ae85u;  // from one round's key to the next

template <class L>
FD_HD void philox_round(typename L::W (&c)[4], uint32_t k0, uint32_t k1) {
  typename L::W hi0, lo0, hi1, lo1;
  L::mulhilo(c[0], kMultiplier0, hi0, lo0);
  L::mulhilo(c[2], kMultiplier1, hi1, lo1);
  c[0] = hi1 ^ c[1] ^ L::word(k0);
  c[1] = lo1;
  c[2] = hi0 ^ c[3] ^ L::word(k1);
  c[3] = lo0;
}

// c is the counter on entry and the four words on return.
template <class L>
FD_HD void philox4x32(typename L::W (&c)[4], uint32_t k0, uint32_t k1) {
  FD_UNROLL
  for (int round = 0; round < kRounds; ++round) {
    philox_round<L>(c, k0, k1);
    k0 += kWeyl0;
    k1 += kWeyl1;
  }
}

// c_0 + x (c_1 + x (c_2 + ...)), multiply and add rounded separately.
template <class F, class C>
FD_HD C horner(F, C c0) {
  return c0;
}
template <class F, class C, class... Rest>
FD_HD F horner(F x, C c0, C c1, Rest... rest) {
  return horner(x, c1, rest...) * x + c0;
}

// -2 log x of a normal positive number.
template <class L>
FD_HD typename L::F minus_twice_log(typename L::F x) {
  using F = typename L::F;
  using U = typename L::U;
  const U ix = L::bits(x) - 0x3f2aaaabu;
  const F e = L::to_float(L::as_int(ix) >> 23);
  const F t = L::from_bits((ix & 0x7fffffu) + 0x3f2aaaabu) - 1.0f;
  const F log_t = horner(t, -0x1.fffffap+0f, 0x1.fffffap-1f, -0x1.5561cep-1f, 0x1.000b8ep-1f,
                         -0x1.955da4p-2f, 0x1.5163f4p-2f, -0x1.5e9f40p-2f, 0x1.352e20p-2f);
  return e * -0x1.62e430p+0f + log_t * t;
}

// Two words to two normals.
template <class L>
FD_HD void box_muller(typename L::U a, typename L::U b, typename L::F& z0, typename L::F& z1) {
  using F = typename L::F;
  const F u = L::to_float(L::as_int(a >> 1)) * 0x1p-31f + 0x1p-32f;
  const F r = L::sqrt(minus_twice_log<L>(u));
  const F y = L::to_float(L::as_int(b << 2)) * 0x1p-31f;
  const F y2 = y * y;
  F s = horner(y2, 0x1.921fb6p-1f, -0x1.4abbecp-4f, 0x1.466b22p-9f, -0x1.2f5a1cp-15f) * y;
  F c = horner(y2, 0x1.fffffep-1f, -0x1.3bd37ep-2f, 0x1.03acccp-6f, -0x1.4dfd38p-12f);
  c = L::from_bits(L::bits(c) ^ (b & 0x80000000u));
  s = s * r;
  c = c * r;
  const auto swap = (b & 0x40000000u) != 0;
  z0 = swap ? s : c;
  z1 = swap ? c : s;
}

// The (seed, sample) of one batch entry.
struct NoiseKey {
  uint32_t seed_low, seed_high, sample;
};

// keys is int64 (B, 2) or null, and then entry b has (seed, sample_offset + b).
FD_HD NoiseKey noise_key(const int64_t* keys, int64_t seed, int64_t sample_offset, int64_t b) {
  const uint64_t bits = static_cast<uint64_t>(keys ? keys[2 * b] : seed);
  const int64_t sample = keys ? keys[2 * b + 1] : sample_offset + b;
  return {static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32),
          static_cast<uint32_t>(sample)};
}

}  // namespace fastdiff
