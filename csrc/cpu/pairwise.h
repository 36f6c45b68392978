// Sums by the fixed tree of fastdiff/ops/loss.py: neighbours 2k and 2k + 1, then neighbouring sums,
// a sum without a neighbour added to +0.
//
// A level of the tree adds neighbouring lanes of two registers into one. Moving lanes only within
// 128-bit groups, and then whole groups, is cheaper than keeping their order, and enough: after
// log2(lanes) levels every lane is in its place again, and in between neighbours stay neighbours in
// the sense of the next level.
#pragma once

#include "kernels.h"
#include "load_store.h"

namespace fastdiff::FASTDIFF_ISA {

constexpr int log2_of(int64_t power) { return power > 1 ? 1 + log2_of(power / 2) : 0; }

template <class T>
struct Pairs {
  using V = Vector<T, kLanes<T>>;
  static constexpr int kWithinGroups = log2_of(16 / static_cast<int>(sizeof(T)));
  static constexpr int kCycle = log2_of(kLanes<T>);

#if defined(FD_AVX512)
  static FD_HD V sum_neighbours(V a, V b) {
    if constexpr (sizeof(T) == 8)
      return (V)_mm512_unpacklo_pd((__m512d)a, (__m512d)b) +
             (V)_mm512_unpackhi_pd((__m512d)a, (__m512d)b);
    else
      return (V)_mm512_shuffle_ps((__m512)a, (__m512)b, 0x88) +
             (V)_mm512_shuffle_ps((__m512)a, (__m512)b, 0xdd);
  }
  static FD_HD V sum_groups(V a, V b) {
    return (V)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0x88) +
           (V)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0xdd);
  }
#elif defined(__AVX2__)
  static FD_HD V sum_neighbours(V a, V b) {
    if constexpr (sizeof(T) == 8)
      return (V)_mm256_unpacklo_pd((__m256d)a, (__m256d)b) +
             (V)_mm256_unpackhi_pd((__m256d)a, (__m256d)b);
    else
      return (V)_mm256_shuffle_ps((__m256)a, (__m256)b, 0x88) +
             (V)_mm256_shuffle_ps((__m256)a, (__m256)b, 0xdd);
  }
  static FD_HD V sum_groups(V a, V b) {
    return (V)_mm256_permute2f128_ps((__m256)a, (__m256)b, 0x20) +
           (V)_mm256_permute2f128_ps((__m256)a, (__m256)b, 0x31);
  }
#else
  static FD_HD V sum_neighbours(V a, V b) {
    if constexpr (sizeof(T) == 8)
      return V{a[0], b[0]} + V{a[1], b[1]};
    else
      return V{a[0], a[2], b[0], b[2]} + V{a[1], a[3], b[1], b[3]};
  }
  static FD_HD V sum_groups(V a, V) { return a; }  // there is one group
#endif

  template <int kLevel>
  static FD_HD V level(V a, V b) {
    if constexpr (kLevel % kCycle < kWithinGroups)
      return sum_neighbours(a, b);
    else
      return sum_groups(a, b);
  }

  // As many levels, from kLevel on, as make one register of a power of two of them.
  template <int kLevel, int kCount>
  static FD_HD V fold(const V (&v)[kCount]) {
    if constexpr (kCount == 1) {
      return v[0];
    } else {
      V half[kCount / 2];
#pragma GCC unroll 8
      for (int k = 0; k < kCount / 2; ++k) half[k] = level<kLevel>(v[2 * k], v[2 * k + 1]);
      return fold<kLevel + 1>(half);
    }
  }

  // The last levels, within one register, up to the sum of kBlock elements.
  template <int kLevel>
  static FD_HD T total(V v) {
    if constexpr (kLevel == log2_of(kBlock))
      return v[0];
    else
      return total<kLevel + 1>(level<kLevel>(v, v));
  }
};

// The sum of a block of a sample, added group by group.
template <class T>
class BlockSum {
 public:
  // The first `count` elements of group number `group`.
  FD_HD void set(int64_t group, Group<T> values, int64_t count) {
    // -0, which changes no sum; what the tree adds where there is no neighbour, total() adds.
    if (count < Group<T>::kSize) {
      alignas(64) T elements[Group<T>::kSize];
      store_group(elements, values);
      for (int64_t i = count; i < Group<T>::kSize; ++i) elements[i] = static_cast<T>(-0.0);
      load_group(elements, values);
    }
    sums_[group] = Pairs<T>::template fold<0>(values.v);
  }

  // Of a block of `count` elements, all of which have been set. only: it is the whole sample.
  T total(int64_t count, bool only) {
    const int64_t groups = (count + Group<T>::kSize - 1) / Group<T>::kSize;
    for (int64_t group = groups; group < kGroups; ++group)
      sums_[group] = broadcast<V>(static_cast<T>(-0.0));
    constexpr int kFolded = log2_of(kUnroll);
    const T sum = Pairs<T>::template total<kFolded + log2_of(kGroups)>(
        Pairs<T>::template fold<kFolded>(sums_));
    const bool had_neighbours = only && (count & (count - 1)) == 0;
    return count == kBlock || had_neighbours ? sum : sum + static_cast<T>(0);
  }

 private:
  using V = typename Group<T>::V;
  static constexpr int kGroups = kBlock / Group<T>::kSize;
  V sums_[kGroups];
};

// Of values in memory, which it overwrites; 0 of none.
template <class T>
T pairwise_sum(T* values, int64_t count) {
  if (count == 0) return 0;
  for (; count > 1; count = (count + 1) / 2) {
    for (int64_t k = 0; k < count / 2; ++k) values[k] = values[2 * k] + values[2 * k + 1];
    if (count % 2) values[count / 2] = values[count - 1] + static_cast<T>(0);
  }
  return values[0];
}

}  // namespace fastdiff::FASTDIFF_ISA
