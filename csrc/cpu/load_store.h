// Registers of float (or double, for float64 tables) from and to memory of any element type.
#pragma once

#include "../include/dtype.h"
#include "lanes.h"

namespace fastdiff::FASTDIFF_ISA {

// ---- 16-bit integers from and to 32-bit lanes. Intrinsics, because GCC's __builtin_convertvector
// does these halves at a time.

template <int N>
FD_HD Vector<uint32_t, N> widen(Vector<uint16_t, N> narrow) {
#if defined(FD_AVX512)
  if constexpr (N == 16) return (Vector<uint32_t, 16>)_mm512_cvtepu16_epi32((__m256i)narrow);
#endif
#if defined(__AVX2__)
  if constexpr (N == 8) return (Vector<uint32_t, 8>)_mm256_cvtepu16_epi32((__m128i)narrow);
#endif
  return __builtin_convertvector(narrow, Vector<uint32_t, N>);
}

// The low halves; the high ones must be zero.
template <int N>
FD_HD Vector<uint16_t, N> narrow(Vector<uint32_t, N> wide) {
#if defined(FD_AVX512)
  if constexpr (N == 16) return (Vector<uint16_t, 16>)_mm512_cvtepi32_epi16((__m512i)wide);
#endif
#if defined(__AVX2__)
  if constexpr (N == 8)
    return (Vector<uint16_t, 8>)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)wide),
                                                 _mm256_extracti128_si256((__m256i)wide, 1));
#elif defined(__SSE2__)
  if constexpr (N == 4) {  // packs saturates, so it is given numbers that it takes for int16
    const auto sign_extended = (__m128i)((Vector<int32_t, 4>)(wide << 16) >> 16);
    const __m128i packed = _mm_packs_epi32(sign_extended, sign_extended);
    return load_vector<Vector<uint16_t, 4>>(&packed);
  }
#endif
  return __builtin_convertvector(wide, Vector<uint16_t, N>);
}

// ---- float32 lanes, N of them, from and to one storage type; dtype.h is the same for one element.

template <int N>
FD_HD Vector<float, N> load(const float* p) {
  return load_vector<Vector<float, N>>(p);
}

template <int N>
FD_HD Vector<float, N> load(const double* p) {
  return __builtin_convertvector(load_vector<Vector<double, N>>(p), Vector<float, N>);
}

template <int N>
FD_HD Vector<float, N> load(const bf16_t* p) {
  const auto bits = load_vector<Vector<uint16_t, N>>(p);
  return (Vector<float, N>)(widen<N>(bits) << 16);
}

template <int N>
FD_HD Vector<float, N> load(const f16_t* p) {
  const auto bits = load_vector<Vector<uint16_t, N>>(p);
#if defined(__F16C__)
  if constexpr (N == 4)
    return (Vector<float, 4>)_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  if constexpr (N == 8) return (Vector<float, 8>)_mm256_cvtph_ps((__m128i)bits);
#if defined(FD_AVX512)
  if constexpr (N == 16) return (Vector<float, 16>)_mm512_cvtph_ps((__m256i)bits);
#endif
#else
  using U = Vector<uint32_t, N>;
  using F = Vector<float, N>;
  const U wide = widen<N>(bits);
  const U magnitude = wide & 0x7fffu, sign = (wide & 0x8000u) << 16;
  const U finite = (U)((F)(magnitude << 13) * 0x1p112f);
  const U special = 0x7f800000u | (magnitude & 0x3ffu) << 13;
  return (F)(sign | (magnitude >= 0x7c00u ? special : finite));
#endif
}

template <int N>
FD_HD void store(float* p, Vector<float, N> value) {
  store_vector(p, value);
}

template <int N>
FD_HD void store(double* p, Vector<float, N> value) {
  store_vector(p, __builtin_convertvector(value, Vector<double, N>));
}

// bfloat16 in the upper half of the bits of a float, before the lower half is cut off. The first
// is for values that are not NaN: a NaN's low bits could carry into infinity.
template <class U>
FD_HD U round_number_to_bf16(U bits) {
  return bits + 0x7fffu + (bits >> 16 & 1u);
}
template <int N>
FD_HD Vector<uint32_t, N> round_to_bf16(Vector<float, N> value) {
  using U = Vector<uint32_t, N>;
  const U nan = U{} + 0x7fc00000u;
  return value == value ? round_number_to_bf16((U)value) : nan;
}

// Upper halves of `even` and `odd` to the lower and upper half of each lane.
FD_HD Lanes::U join_halves(Lanes::U even, Lanes::U odd) {
#if defined(__AVX2__) && !defined(FD_AVX512)
  return (Lanes::U)_mm256_blend_epi16((__m256i)(even >> 16), (__m256i)odd, 0xaa);
#else
  return even >> 16 | (odd & 0xffff0000u);
#endif
}

FD_HD bool has_nan(Lanes::F a, Lanes::F b) {
#if defined(FD_AVX512)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_UNORD_Q) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_UNORD_Q)) != 0;
#elif defined(__SSE2__)
  return _mm_movemask_ps(_mm_cmpunord_ps((__m128)a, (__m128)b)) != 0;
#else
  return true;
#endif
}

#if defined(FD_AVX512_BF16)
// Rounds to nearest even, but takes denormals for zero: where has_zeros(), the values have to be
// rounded as above instead. `low` comes first in the register.
using Packed = Vector<uint32_t, 16>;
FD_HD Packed pack_bf16(Vector<float, 16> low, Vector<float, 16> high) {
  return (Packed)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
}
FD_HD bool has_zeros(Packed packed) {
  return _mm512_testn_epi16_mask((__m512i)packed, _mm512_set1_epi16(0x7fff)) != 0;
}

// Where each 16-bit element of a result comes from, counted through the registers given.
struct Indices {
  uint16_t of[32];
};
constexpr Indices halves_in_turn() {
  Indices indices{};
  for (int i = 0; i < 32; ++i) indices.of[i] = static_cast<uint16_t>(i / 2 + i % 2 * 16);
  return indices;
}
FD_HD Packed permute(const Indices& indices, Packed packed) {
  return (Packed)_mm512_permutexvar_epi16(load_vector<__m512i>(indices.of), (__m512i)packed);
}
FD_HD Packed permute(const Indices& indices, Packed a, Packed b) {
  const auto order = load_vector<__m512i>(indices.of);
  return (Packed)_mm512_permutex2var_epi16((__m512i)a, order, (__m512i)b);
}
#endif

// Two registers of values to one: even[0], odd[0], even[1] ...
FD_HD Lanes::U pack_in_turn(Lanes::F even, Lanes::F odd) {
#if defined(FD_AVX512_BF16)
  static constexpr Indices kInTurn = halves_in_turn();
  const Packed packed = pack_bf16(even, odd);
  if (__builtin_expect(!has_zeros(packed), 1)) return permute(kInTurn, packed);
#else
  if (__builtin_expect(!has_nan(even, odd), 1))
    return join_halves(round_number_to_bf16(Lanes::bits(even)),
                       round_number_to_bf16(Lanes::bits(odd)));
#endif
  return join_halves(round_to_bf16<Lanes::kCount>(even), round_to_bf16<Lanes::kCount>(odd));
}

template <int N>
FD_HD void store(bf16_t* p, Vector<float, N> value) {
#if defined(FD_AVX512_BF16)
  if constexpr (N == 16) {
    const __m256i packed = (__m256i)_mm512_cvtneps_pbh((__m512)value);
    if (__builtin_expect(!_mm256_testn_epi16_mask(packed, _mm256_set1_epi16(0x7fff)), 1)) {
      store_vector(p, packed);
      return;
    }
  }
#endif
  store_vector(p, narrow<N>(round_to_bf16<N>(value) >> 16));
}

template <int N>
FD_HD void store(f16_t* p, Vector<float, N> value) {
#if defined(__F16C__)
  if constexpr (N == 4)
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p),
                     _mm_cvtps_ph((__m128)value, _MM_FROUND_TO_NEAREST_INT));
  if constexpr (N == 8) store_vector(p, _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT));
#if defined(FD_AVX512)
  if constexpr (N == 16) store_vector(p, _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT));
#endif
#else
  using U = Vector<uint32_t, N>;
  using F = Vector<float, N>;
  const U bits = (U)value;
  const U sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  const U normal = (magnitude + 0xfffu + (magnitude >> 13 & 1u) - 0x38000000u) >> 13;
  const U denormal = (U)((F)magnitude + 0.5f) - 0x3f000000u;
  const U infinity = U{} + 0x7c00u, nan = U{} + 0x7e00u;
  U half = magnitude < 0x38800000u ? denormal : normal;
  half = magnitude >= 0x477ff000u ? infinity : half;
  half = magnitude > 0x7f800000u ? nan : half;
  store_vector(p, narrow<N>(sign | half));
#endif
}

// ---- Groups: kUnroll registers of the arithmetic type T, so that there is work in flight.

constexpr int kUnroll = kRegisters / 4;

template <class T>
struct Group {
  using V = Vector<T, kLanes<T>>;
  static constexpr int kSize = kUnroll * kLanes<T>;
  V v[kUnroll];
};

template <class T, class S>
FD_HD void load_group(const S* p, Group<T>& group) {
  constexpr int N = kLanes<T>;
#pragma GCC unroll 8
  for (int u = 0; u < kUnroll; ++u) {
    if constexpr (std::is_same_v<T, S>)
      group.v[u] = load_vector<Vector<T, N>>(p + u * N);
    else
      group.v[u] = __builtin_convertvector(load<N>(p + u * N), Vector<T, N>);
  }
}

template <class T, class S>
FD_HD void store_group(S* p, const Group<T>& group) {
  constexpr int N = kLanes<T>;
#pragma GCC unroll 8
  for (int u = 0; u < kUnroll; ++u) {
    if constexpr (std::is_same_v<T, S>)
      store_vector(p + u * N, group.v[u]);
    else  // double to 16 bits goes through float, as torch does
      store<N>(p + u * N, __builtin_convertvector(group.v[u], Vector<float, N>));
  }
}

template <class T>
FD_HD void stream_group(T* p, const Group<T>& group) {
#pragma GCC unroll 8
  for (int u = 0; u < kUnroll; ++u) stream_vector(p + u * kLanes<T>, group.v[u]);
}

// A place in a tensor: the address of an element and its type, known at run time only. The type is
// the same for millions of elements, so the branches on it below are predicted.
struct Place {
  char* data;
  DType dtype;
};

inline int64_t size_of(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}

// float64 tensors under a float32 table: rare, so kept out of the code of the other types.
__attribute__((noinline)) inline void floats_of(const double* p, float* floats) {
  for (int i = 0; i < Group<float>::kSize; ++i) floats[i] = to_f32(p[i]);
}
__attribute__((noinline)) inline void doubles_of(const float* floats, double* p) {
  for (int i = 0; i < Group<float>::kSize; ++i) p[i] = floats[i];
}

template <class T>
FD_HD void load_group(const Place& place, int64_t i, Group<T>& group) {
  if (place.dtype == DType::f32) {
    load_group(reinterpret_cast<const float*>(place.data) + i, group);
  } else if (place.dtype == DType::bf16) {
    load_group(reinterpret_cast<const bf16_t*>(place.data) + i, group);
  } else if (place.dtype == DType::f16) {
    load_group(reinterpret_cast<const f16_t*>(place.data) + i, group);
  } else if constexpr (std::is_same_v<T, double>) {
    load_group(reinterpret_cast<const double*>(place.data) + i, group);
  } else {
    alignas(64) float floats[Group<T>::kSize];
    floats_of(reinterpret_cast<const double*>(place.data) + i, floats);
    load_group(floats, group);
  }
}

template <class T>
FD_HD void store_group(const Place& place, int64_t i, const Group<T>& group) {
  if (place.dtype == DType::f32) {
    store_group(reinterpret_cast<float*>(place.data) + i, group);
  } else if (place.dtype == DType::bf16) {
    store_group(reinterpret_cast<bf16_t*>(place.data) + i, group);
  } else if (place.dtype == DType::f16) {
    store_group(reinterpret_cast<f16_t*>(place.data) + i, group);
  } else if constexpr (std::is_same_v<T, double>) {
    store_group(reinterpret_cast<double*>(place.data) + i, group);
  } else {
    alignas(64) float floats[Group<T>::kSize];
    store_group(floats, group);
    doubles_of(floats, reinterpret_cast<double*>(place.data) + i);
  }
}

}  // namespace fastdiff::FASTDIFF_ISA
