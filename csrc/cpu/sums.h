// Sums of terms a_k * source_k, as compacted from a row of the coefficient table: multiplies and
// adds rounded separately, in column order, starting at -0 (the identity of addition).
#pragma once

#include <utility>

#include "kernels.h"
#include "load_store.h"

namespace fastdiff::FASTDIFF_ISA {

constexpr int kMaxColumns = kMaxStates + 2 + kMaxDraws;  // S, o, c, z

// With `base`, the value is base + guidance * (source - base); with `scale`, one per element, the
// coefficient is a * scale.
template <class T>
struct Term {
  T coefficient;
  const Place* source;
  const Place* base;
  const T* scale;
};

template <class T>
struct Sum {
  int count;
  Term<T> terms[kMaxColumns];
};

// One group, whatever the terms are. i is the element within the block.
template <class T>
FD_HD void evaluate(const Sum<T>& sum, T guidance, int64_t i, Group<T>& result) {
  using V = typename Group<T>::V;
  Group<T> acc;
#pragma GCC unroll 8
  for (int u = 0; u < kUnroll; ++u) acc.v[u] = broadcast<V>(static_cast<T>(-0.0));
  for (int k = 0; k < sum.count; ++k) {
    const Term<T>& term = sum.terms[k];
    Group<T> value;
    load_group(*term.source, i, value);
    if (term.base) {
      Group<T> base;
      load_group(*term.base, i, base);
#pragma GCC unroll 8
      for (int u = 0; u < kUnroll; ++u)
        value.v[u] = base.v[u] + guidance * (value.v[u] - base.v[u]);
    }
    if (term.scale) {
#pragma GCC unroll 8
      for (int u = 0; u < kUnroll; ++u)
        value.v[u] *= term.coefficient * load_vector<V>(term.scale + i + u * kLanes<T>);
    } else {
#pragma GCC unroll 8
      for (int u = 0; u < kUnroll; ++u) value.v[u] *= term.coefficient;
    }
#pragma GCC unroll 8
    for (int u = 0; u < kUnroll; ++u) acc.v[u] += value.v[u];
  }
  result = acc;
}

// ---- The common case again, fast enough for the memory system: float32 arithmetic, all sources
// and the target of one type S (or a float32 target of sources of any 16 or 32 bits), up to
// kUniformTerms terms, at most the last one guided.

constexpr int kUniformTerms = 8;

template <int kVectors>
FD_HD void load_floats(const float* p, Lanes::F (&v)[kVectors]) {
#pragma GCC unroll 2
  for (int k = 0; k < kVectors; ++k) v[k] = load_vector<Lanes::F>(p + k * Lanes::kCount);
}
template <int kVectors>
FD_HD void store_floats(float* p, const Lanes::F (&v)[kVectors]) {
#pragma GCC unroll 2
  for (int k = 0; k < kVectors; ++k) store_vector(p + k * Lanes::kCount, v[k]);
}

// The smallest run of S that fills a register, and how floats are laid out for it.
template <class S>
struct Pack {
  static constexpr int kVectors = 1, kSize = Lanes::kCount;
  static FD_HD void unpack(const S* p, Lanes::F (&v)[1]) { v[0] = load<Lanes::kCount>(p); }
  template <bool kStream>
  static FD_HD void pack(S* p, const Lanes::F (&v)[1]) {
    if constexpr (kStream && std::is_same_v<S, float>)
      stream_vector(p, v[0]);
    else
      store<Lanes::kCount>(p, v[0]);
  }
};

// bfloat16 is the upper half of a float, so a register of 16-bit values splits into its even and
// odd ones with a shift and a mask; they join again in the same way, and nothing is permuted.
template <>
struct Pack<bf16_t> {
  static constexpr int kVectors = 2, kSize = 2 * Lanes::kCount;
  static FD_HD void unpack(const bf16_t* p, Lanes::F (&v)[2]) {
    const auto both = load_vector<Lanes::U>(p);
    v[0] = Lanes::from_bits(both << 16);
    v[1] = Lanes::from_bits(both & 0xffff0000u);
  }
  template <bool kStream>
  static FD_HD void pack(bf16_t* p, const Lanes::F (&v)[2]) {
    const Lanes::U both = pack_in_turn(v[0], v[1]);
    if constexpr (kStream)
      stream_vector(p, both);
    else
      store_vector(p, both);
  }
};

// What becomes of the clamp node's value: clamped, NaN passing, then scaled (by 1 unless a
// threshold is divided out).
template <class T>
struct Clamp {
  T low, high, scale = 1;

  template <class V>
  FD_HD V operator()(V value) const {
    const V at_most = value > high ? broadcast<V>(high) : value;
    return (value < low ? broadcast<V>(low) : at_most) * scale;
  }
};

using UniformSum = void (*)(const Sum<float>& sum, float guidance, const Clamp<float>& clamp,
                            int64_t count, char* target);

enum class Mode {
  kStore,
  kStream,   // stored past the caches
  kScratch,  // clamped; the target is float, in the order in which Pack<S> lays floats out
  kMixed,    // a source is the clamp node in that form
  kConvert,  // sources of any type, in memory order; the target is float
  kConvertStream,
  kConvertScratch,
};

FD_HD Lanes::F load_any(const char* data, DType type, int64_t i) {
  constexpr int N = Lanes::kCount;
  if (type == DType::f32) return load<N>(reinterpret_cast<const float*>(data) + i);
  if (type == DType::bf16) return load<N>(reinterpret_cast<const bf16_t*>(data) + i);
  return load<N>(reinterpret_cast<const f16_t*>(data) + i);
}

template <class S, int kTerms, bool kGuided, Mode kMode>
void uniform_sum(const Sum<float>& sum, float guidance, const Clamp<float>& clamp, int64_t count,
                 char* target) {
  using P = Pack<S>;
  using F = Lanes::F;
  constexpr int kStep = 4 * Lanes::kCount, kPacks = kStep / P::kSize;
  constexpr bool kConverts = kMode >= Mode::kConvert;
  constexpr bool kScratches = kMode == Mode::kScratch || kMode == Mode::kConvertScratch;
  constexpr bool kStreams = kMode == Mode::kStream || kMode == Mode::kConvertStream;
  static_assert(Group<float>::kSize % kStep == 0, "a group is whole steps");
  const char* source[kTerms];
  float a[kTerms];
  DType type[kTerms];
#pragma GCC unroll 8
  for (int k = 0; k < kTerms; ++k) {
    source[k] = sum.terms[k].source->data;
    a[k] = sum.terms[k].coefficient;
    type[k] = sum.terms[k].source->dtype;
  }
  const char* base = kGuided ? sum.terms[kTerms - 1].base->data : nullptr;
  for (int64_t start = 0; start < count; start += kStep) {
#pragma GCC unroll 4
    for (int pack = 0; pack < kPacks; ++pack) {
      const int64_t i = start + pack * P::kSize;
      F acc[P::kVectors];
#pragma GCC unroll 8
      for (int k = 0; k < kTerms; ++k) {
        F value[P::kVectors], from[P::kVectors];
        if constexpr (kConverts) {
          value[0] = load_any(source[k], type[k], i);
          if (kGuided && k == kTerms - 1) from[0] = load_any(base, type[k], i);
        } else {
          if (kMode == Mode::kMixed && type[k] == DType::f32)
            load_floats(reinterpret_cast<const float*>(source[k]) + i, value);
          else
            P::unpack(reinterpret_cast<const S*>(source[k]) + i, value);
          if (kGuided && k == kTerms - 1) P::unpack(reinterpret_cast<const S*>(base) + i, from);
        }
#pragma GCC unroll 2
        for (int v = 0; v < P::kVectors; ++v) {
          if (kGuided && k == kTerms - 1) value[v] = from[v] + guidance * (value[v] - from[v]);
          // -0 + value is value, so the first term starts the sum.
          acc[v] = k == 0 ? a[k] * value[v] : acc[v] + a[k] * value[v];
        }
      }
      if constexpr (kScratches) {
#pragma GCC unroll 2
        for (int v = 0; v < P::kVectors; ++v) acc[v] = clamp(acc[v]);
        store_floats(reinterpret_cast<float*>(target) + i, acc);
      } else {
        P::template pack<kStreams>(reinterpret_cast<S*>(target) + i, acc);
      }
    }
  }
}

template <class S, Mode kMode, bool kGuided, int... kTerms>
UniformSum uniform_sum_among(int terms, std::integer_sequence<int, kTerms...>) {
  static constexpr UniformSum kSums[] = {uniform_sum<S, kTerms + 1, kGuided, kMode>...};
  return terms >= 1 && terms <= static_cast<int>(sizeof...(kTerms)) ? kSums[terms - 1] : nullptr;
}

template <class S, Mode kMode>
UniformSum uniform_sum_of(int terms, bool guided) {
  constexpr std::make_integer_sequence<int, kUniformTerms> kCounts{};
  return guided ? uniform_sum_among<S, kMode, true>(terms, kCounts)
                : uniform_sum_among<S, kMode, false>(terms, kCounts);
}

// The sum for sources of one type, and a target of that type unless the mode is kScratch; a float
// target takes sources of any type but double. The clamp node may be among the sources when its
// place is given. Null where only evaluate() will do.
inline UniformSum uniform_sum_for(const Sum<float>& sum, DType type, Mode mode,
                                  const Place* clamped) {
  bool converts = false;
  for (int k = 0; k < sum.count; ++k) {
    const Term<float>& term = sum.terms[k];
    const bool guided_early = term.base && k + 1 < sum.count;
    if (term.scale || guided_early) return nullptr;
    if (term.base && term.base->dtype != term.source->dtype) return nullptr;
    if (term.source->dtype == type) continue;
    if (term.source == clamped) {
      mode = Mode::kMixed;
    } else if (type == DType::f32 && term.source->dtype != DType::f64) {
      converts = true;
    } else {
      return nullptr;
    }
  }
  const bool guided = sum.count > 0 && sum.terms[sum.count - 1].base;
  if (type == DType::f32) {
    if (mode == Mode::kScratch)
      return converts ? uniform_sum_of<float, Mode::kConvertScratch>(sum.count, guided)
                      : uniform_sum_of<float, Mode::kScratch>(sum.count, guided);
    if (mode == Mode::kStream)
      return converts ? uniform_sum_of<float, Mode::kConvertStream>(sum.count, guided)
                      : uniform_sum_of<float, Mode::kStream>(sum.count, guided);
    return converts ? uniform_sum_of<float, Mode::kConvert>(sum.count, guided)
                    : uniform_sum_of<float, Mode::kStore>(sum.count, guided);
  }
  if (type == DType::bf16) {
    if (mode == Mode::kStore) return uniform_sum_of<bf16_t, Mode::kStore>(sum.count, guided);
    if (mode == Mode::kStream) return uniform_sum_of<bf16_t, Mode::kStream>(sum.count, guided);
    if (mode == Mode::kScratch) return uniform_sum_of<bf16_t, Mode::kScratch>(sum.count, guided);
    return uniform_sum_of<bf16_t, Mode::kMixed>(sum.count, guided);
  }
  if (type == DType::f16) {
    if (mode == Mode::kScratch) return uniform_sum_of<f16_t, Mode::kScratch>(sum.count, guided);
    if (mode == Mode::kMixed) return uniform_sum_of<f16_t, Mode::kMixed>(sum.count, guided);
    return uniform_sum_of<f16_t, Mode::kStore>(sum.count, guided);
  }
  return nullptr;
}

}  // namespace fastdiff::FASTDIFF_ISA
