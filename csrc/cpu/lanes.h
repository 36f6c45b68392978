// The lane policy of noise.h for one SIMD register, over GCC vector extensions. The widest register
// that this object file's -march allows is chosen here; kernels.cpp is compiled once per level, so
// everything in csrc/cpu lives in a namespace of the level's name and the linker merges none of it.
#pragma once

#include "../include/noise.h"

#if defined(__SSE2__)
#include <immintrin.h>
#else
#include <cmath>
#endif

namespace fastdiff::FASTDIFF_ISA {

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define FD_AVX512 1
#if defined(__AVX512BF16__)
#define FD_AVX512_BF16 1
#endif
constexpr int kRegisterBytes = 64;
constexpr int kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kRegisterBytes = 32;
constexpr int kRegisters = 16;
#else
constexpr int kRegisterBytes = 16;
constexpr int kRegisters = 16;
#endif

// N lanes of T. A class, because GCC takes a dependent vector_size only in a typedef.
template <class T, int N>
struct VectorOf {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
};
template <class T, int N>
using Vector = typename VectorOf<T, N>::type;

template <class V>
FD_HD V load_vector(const void* source) {
  V value;
  memcpy(&value, source, sizeof(V));
  return value;
}
template <class V>
FD_HD void store_vector(void* target, V value) {
  memcpy(target, &value, sizeof(V));
}

// Past the caches; the target must be aligned to the vector. Ordered by fence_streams().
template <class V>
FD_HD void stream_vector(void* target, V value) {
#if defined(FD_AVX512)
  _mm512_stream_si512(static_cast<__m512i*>(target), (__m512i)value);
#elif defined(__AVX2__)
  _mm256_stream_si256(static_cast<__m256i*>(target), (__m256i)value);
#elif defined(__SSE2__)
  _mm_stream_si128(static_cast<__m128i*>(target), (__m128i)value);
#else
  store_vector(target, value);
#endif
}
inline void fence_streams() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Every lane `value`. Not 0 + value: that would turn -0 into 0.
template <class V, class T>
FD_HD V broadcast(T value) {
  return value - V{};
}

// Lanes of a float register, and of the arithmetic of float64 tables.
template <class T>
constexpr int kLanes = kRegisterBytes / static_cast<int>(sizeof(T));

struct Lanes {
  static constexpr int kCount = kLanes<float>;
  using F = Vector<float, kCount>;
  using U = Vector<uint32_t, kCount>;
  using I = Vector<int32_t, kCount>;
  using Wide = Vector<uint64_t, kCount / 2>;

  // One Philox word of kCounters counters: several registers, so that the chains of dependent
  // multiplies overlap, each with one counter per 64-bit lane. The multiply reads only the low
  // half of a lane, so nothing is ever masked: lo = p, hi = p >> 32.
  static constexpr int kChains = 4;
  static constexpr int kCounters = kChains * kCount / 2;
  struct W {
    Wide chain[kChains];
    friend FD_HD W operator^(W a, W b) {
#pragma GCC unroll 4
      for (int i = 0; i < kChains; ++i) a.chain[i] ^= b.chain[i];
      return a;
    }
  };

  static FD_HD W word(uint32_t value) {
    W result;
#pragma GCC unroll 4
    for (int i = 0; i < kChains; ++i) result.chain[i] = Wide{} + value;
    return result;
  }
  static FD_HD void mulhilo(W a, uint32_t m, W& hi, W& lo) {
#pragma GCC unroll 4
    for (int i = 0; i < kChains; ++i) {
      lo.chain[i] = multiply_low_halves(a.chain[i], m);
      hi.chain[i] = lo.chain[i] >> 32;
    }
  }
  static FD_HD Wide multiply_low_halves(Wide a, uint32_t m) {
#if defined(FD_AVX512)
    return (Wide)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(m));
#elif defined(__AVX2__)
    return (Wide)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(m));
#elif defined(__SSE2__)
    return (Wide)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(m));
#else
    return (a & 0xffffffffu) * m;
#endif
  }

  // Low halves of `even` to the even lanes, of `odd` to the odd lanes.
  static FD_HD U merge(Wide even, Wide odd) {
#if defined(FD_AVX512)
    return (U)_mm512_mask_shuffle_epi32((__m512i)even, 0xaaaa, (__m512i)odd,
                                        static_cast<_MM_PERM_ENUM>(0xa0));
#elif defined(__AVX2__)
    return (U)_mm256_blend_epi32((__m256i)even, (__m256i)(odd << 32), 0xaa);
#else
    return (U)((even & 0xffffffffu) | odd << 32);
#endif
  }

  // Lane j of a merged register holds counter counter_of(j) of its kCount counters: so chosen that
  // interleave() leaves memory order without moving anything across 128-bit groups.
  static constexpr int kGroups = kCount / 4;
  static constexpr int counter_of(int j) { return j % 4 * kGroups + j / 4; }

  // z[k] holds element k of every counter; on return z[0], z[1].. are consecutive in memory order.
  static FD_HD void interleave(F (&z)[4]) {
    const F low01 = unpack_low(z[0], z[1]), high01 = unpack_high(z[0], z[1]);
    const F low23 = unpack_low(z[2], z[3]), high23 = unpack_high(z[2], z[3]);
    z[0] = unpack_low_pairs(low01, low23);
    z[1] = unpack_high_pairs(low01, low23);
    z[2] = unpack_low_pairs(high01, high23);
    z[3] = unpack_high_pairs(high01, high23);
  }

  // The same for 16-bit elements, two to a lane: z01 and z23 of every counter to memory order.
  static constexpr int counter_of_pairs(int j) {
    return j % 4 / 2 * (2 * kGroups) + j / 4 * 2 + j % 2;
  }
  static FD_HD void interleave_pairs(U& z01, U& z23) {
    const F low = unpack_low((F)z01, (F)z23), high = unpack_high((F)z01, (F)z23);
    z01 = (U)low;
    z23 = (U)high;
  }

  static FD_HD I as_int(U value) { return (I)value; }
  static FD_HD F to_float(I value) { return __builtin_convertvector(value, F); }
  static FD_HD U bits(F value) { return (U)value; }
  static FD_HD F from_bits(U value) { return (F)value; }
  static FD_HD F splat(float value) { return broadcast<F>(value); }

#if defined(FD_AVX512)
  static FD_HD F sqrt(F x) { return (F)_mm512_sqrt_ps((__m512)x); }
  static FD_HD F unpack_low(F a, F b) { return (F)_mm512_unpacklo_ps((__m512)a, (__m512)b); }
  static FD_HD F unpack_high(F a, F b) { return (F)_mm512_unpackhi_ps((__m512)a, (__m512)b); }
  static FD_HD F unpack_low_pairs(F a, F b) {
    return (F)_mm512_unpacklo_pd((__m512d)a, (__m512d)b);
  }
  static FD_HD F unpack_high_pairs(F a, F b) {
    return (F)_mm512_unpackhi_pd((__m512d)a, (__m512d)b);
  }
#elif defined(__AVX2__)
  static FD_HD F sqrt(F x) { return (F)_mm256_sqrt_ps((__m256)x); }
  static FD_HD F unpack_low(F a, F b) { return (F)_mm256_unpacklo_ps((__m256)a, (__m256)b); }
  static FD_HD F unpack_high(F a, F b) { return (F)_mm256_unpackhi_ps((__m256)a, (__m256)b); }
  static FD_HD F unpack_low_pairs(F a, F b) {
    return (F)_mm256_unpacklo_pd((__m256d)a, (__m256d)b);
  }
  static FD_HD F unpack_high_pairs(F a, F b) {
    return (F)_mm256_unpackhi_pd((__m256d)a, (__m256d)b);
  }
#else
#if defined(__SSE2__)
  static FD_HD F sqrt(F x) { return (F)_mm_sqrt_ps((__m128)x); }
#else
  static FD_HD F sqrt(F x) {
    return F{std::sqrt(x[0]), std::sqrt(x[1]), std::sqrt(x[2]), std::sqrt(x[3])};
  }
#endif
  static FD_HD F unpack_low(F a, F b) { return F{a[0], b[0], a[1], b[1]}; }
  static FD_HD F unpack_high(F a, F b) { return F{a[2], b[2], a[3], b[3]}; }
  static FD_HD F unpack_low_pairs(F a, F b) { return F{a[0], a[1], b[0], b[1]}; }
  static FD_HD F unpack_high_pairs(F a, F b) { return F{a[2], a[3], b[2], b[3]}; }
#endif
};

// The policy of exp.h, log.h and loss.h for the arithmetic type T.
template <class T>
struct MathLanes;
template <>
struct MathLanes<float> : Lanes {
  using T = float;
};
template <>
struct MathLanes<double> {
  using T = double;
  using F = Vector<double, kLanes<double>>;
  using U = Vector<uint64_t, kLanes<double>>;
  static FD_HD U bits(F value) { return (U)value; }
  static FD_HD F from_bits(U value) { return (F)value; }
  static FD_HD F splat(double value) { return broadcast<F>(value); }
#if defined(FD_AVX512)
  static FD_HD F sqrt(F x) { return (F)_mm512_sqrt_pd((__m512d)x); }
#elif defined(__AVX2__)
  static FD_HD F sqrt(F x) { return (F)_mm256_sqrt_pd((__m256d)x); }
#elif defined(__SSE2__)
  static FD_HD F sqrt(F x) { return (F)_mm_sqrt_pd((__m128d)x); }
#else
  static FD_HD F sqrt(F x) { return F{std::sqrt(x[0]), std::sqrt(x[1])}; }
#endif
};

}  // namespace fastdiff::FASTDIFF_ISA
