// Bits drawn and bounded (fastdiff/ops/bits.py) over blocks of a sample.
#pragma once

#include "../include/bits.h"
#include "pairwise.h"
#include "randn.h"

namespace fastdiff::FASTDIFF_ISA {

// A lane of an arithmetic type as an integer of its size: what comparisons give.
template <class T>
using MaskOf = std::conditional_t<std::is_same_v<T, double>, int64_t, int32_t>;

inline int64_t size_of_bits(DType dtype) { return dtype == DType::u8 ? 1 : size_of(dtype); }

// One group of a block of `count` elements, zeros beyond them.
template <class T>
FD_HD void load_bits(const Operand& operand, int64_t first, int64_t i, int64_t count,
                     Group<T>& group) {
  constexpr int N = kLanes<T>;
  const int64_t size = size_of_bits(operand.dtype);
  const char* from = static_cast<const char*>(operand.data) + (first + i) * size;
  alignas(64) char tail[Group<T>::kSize * 8];
  if (i + Group<T>::kSize > count) {
    memset(tail, 0, sizeof(tail));
    memcpy(tail, from, static_cast<size_t>((count - i) * size));
    from = tail;
  }
  if (operand.dtype != DType::u8) {
    load_group(Place{const_cast<char*>(from), operand.dtype}, 0, group);
    return;
  }
#pragma GCC unroll 8
  for (int u = 0; u < kUnroll; ++u)
    group.v[u] =
        __builtin_convertvector(load_vector<Vector<uint8_t, N>>(from + u * N), Vector<T, N>);
}

// One group of the result: `set` has masks; NaN goes to floating elements.
template <class T>
FD_HD void store_bits(const Operand& operand, int64_t first, int64_t i, int64_t count,
                      const Group<T>& p, const Vector<MaskOf<T>, kLanes<T>> (&set)[kUnroll]) {
  using V = typename Group<T>::V;
  constexpr int N = kLanes<T>;
  const int64_t size = size_of_bits(operand.dtype);
  char* to = static_cast<char*>(operand.data) + (first + i) * size;
  alignas(64) char tail[Group<T>::kSize * 8];
  const bool whole = i + Group<T>::kSize <= count;
  char* target = whole ? to : tail;
  if (operand.dtype == DType::u8) {
#pragma GCC unroll 8
    for (int u = 0; u < kUnroll; ++u)
      store_vector(target + u * N, __builtin_convertvector(set[u] & 1, Vector<uint8_t, N>));
  } else {
    Group<T> values;
    const V zero = {}, one = broadcast<V>(static_cast<T>(1));
#pragma GCC unroll 8
    for (int u = 0; u < kUnroll; ++u) {
      const V bit = set[u] ? one : zero;
      values.v[u] = p.v[u] == p.v[u] ? bit : p.v[u];
    }
    store_group(Place{target, operand.dtype}, 0, values);
  }
  if (!whole) memcpy(to, tail, static_cast<size_t>((count - i) * size));
}

// Philox words in the order of their elements, whole runs of them.
__attribute__((noinline)) inline void fill_words(const Draw& draw, uint32_t first_block,
                                                 uint32_t* words, int64_t count) {
  for (int64_t run = 0; run < count; run += kRun) {
    const Words made = words_of<float>(draw, first_block);
    first_block += Lanes::kCounters;
#pragma GCC unroll 2
    for (int half = 0; half < Lanes::kChains / 2; ++half) {
      Lanes::F quad[4];
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) quad[k] = Lanes::from_bits(made.of[half][k]);
      Lanes::interleave(quad);
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k)
        store_vector(words + run + (4 * half + k) * Lanes::kCount, quad[k]);
    }
  }
}

// Masks of word < 2^32 p, compared exactly. Below 2^31 a float's whole part is an int32; from there
// on it has no other part.
FD_HD Lanes::I is_below(const uint32_t* words, Lanes::F p) {
  using F = Lanes::F;
  using I = Lanes::I;
  using U = Lanes::U;
  const F scaled = p * 0x1p32f, zero = {};
  const I high = scaled >= 0x1p31f;
  const F small = high ? scaled - 0x1p31f : scaled;
  const F rest = p < 1.0f ? small : zero;
  const I whole = __builtin_convertvector(rest, I);
  const I fraction = Lanes::to_float(whole) < rest;  // -1 where the part left is not zero
  const U threshold = (U)(whole - fraction) + ((U)high & 0x80000000u);
  return (I)(load_vector<U>(words) < threshold) | (I)(p >= 1.0f);
}
FD_HD Vector<int64_t, kLanes<double>> is_below(const uint32_t* words, Group<double>::V p) {
  const auto word = load_vector<Vector<uint32_t, kLanes<double>>>(words);
  return __builtin_convertvector(word, Group<double>::V) < p * 0x1p32;
}

// The row of sample b in the arithmetic type; NaN outside of the table.
template <class T, int kColumns, class P>
FD_HD void read_row(const P& p, int64_t b, T (&row)[kColumns]) {
  const int64_t index = p.rows[b * p.rows_stride];
  const bool inside = index >= 0 && index < p.table_rows;
  for (int k = 0; k < kColumns; ++k)
    row[k] = inside ? static_cast<const T*>(p.table)[index * p.table_width + k]
                    : static_cast<T>(__builtin_nan(""));
}

template <class T>
__attribute__((noinline)) void bits_blocks(const BitsParams& p, int64_t first, int64_t last) {
  using L = MathLanes<T>;
  using V = typename Group<T>::V;
  using Mask = Vector<MaskOf<T>, kLanes<T>>;
  constexpr int kGroup = Group<T>::kSize;
  alignas(64) uint32_t words[kBlock];
  const int64_t per_sample = blocks_per_sample(p.n);
  T row[4] = {};
  for (int64_t block = first; block < last; ++block) {
    const int64_t b = block / per_sample, begin = block % per_sample * kBlock;
    const int64_t count = p.n - begin < kBlock ? p.n - begin : kBlock, element = b * p.n + begin;
    if (p.logits.data) {
      read_row(p, b, row);
    } else {  // a[x] as a[x, 0]
      T two[2];
      read_row(p, b, two);
      row[0] = two[0], row[2] = two[1];
    }
    const Draw draw{noise_key(p.keys, p.seed, p.sample_offset, b), static_cast<uint32_t>(p.step),
                    static_cast<uint32_t>(p.stream)};
    fill_words(draw, static_cast<uint32_t>(begin / 4), words, count);
    for (int64_t i = 0; i < count; i += kGroup) {
      Group<T> x = {}, logits, probability;
      if (p.x.data) load_bits(p.x, element, i, count, x);
      if (p.logits.data) load_bits(p.logits, element, i, count, logits);
      Mask set[kUnroll];
#pragma GCC unroll 8
      for (int u = 0; u < kUnroll; ++u) {
        const Mask given = x.v[u] != static_cast<T>(0);
        const V value =
            p.logits.data ? bit_probability<L>(logits.v[u], given, row) : by_bit<L, 0>(row, given);
        probability.v[u] = value;
        set[u] = is_below(words + i + u * kLanes<T>, value);
      }
      store_bits(p.out, element, i, count, probability, set);
    }
  }
}

inline void bits(const BitsParams& p, int64_t first, int64_t last) {
  if (p.table_dtype == DType::f64)
    bits_blocks<double>(p, first, last);
  else
    bits_blocks<float>(p, first, last);
}

// Calls action(logits, x_t, x_start, i) for every register of a block, the bits as masks.
template <class T, class Action>
FD_HD void each_register(const BitsBoundParams& p, int64_t element, int64_t i, int64_t count,
                         const Action& action) {
  using Mask = Vector<MaskOf<T>, kLanes<T>>;
  Group<T> logits, x_t, x_start;
  load_bits(p.logits, element, i, count, logits);
  load_bits(p.x_t, element, i, count, x_t);
  load_bits(p.x_start, element, i, count, x_start);
#pragma GCC unroll 8
  for (int u = 0; u < kUnroll; ++u) {
    const Mask at = x_t.v[u] != static_cast<T>(0), start = x_start.v[u] != static_cast<T>(0);
    action(logits.v[u], at, start, u);
  }
}

template <class T, bool kMixture>
__attribute__((noinline)) void bits_bound_blocks(const BitsBoundParams& p, int64_t first,
                                                 int64_t last) {
  using L = MathLanes<T>;
  using V = typename Group<T>::V;
  using Mask = Vector<MaskOf<T>, kLanes<T>>;
  BlockSum<T> sum;
  const int64_t per_sample = blocks_per_sample(p.n);
  T row[kBitsColumns];
  for (int64_t block = first; block < last; ++block) {
    const int64_t b = block / per_sample, begin = block % per_sample * kBlock;
    const int64_t count = p.n - begin < kBlock ? p.n - begin : kBlock;
    read_row(p, b, row);
    for (int64_t i = 0; i < count; i += Group<T>::kSize) {
      Group<T> values;
      each_register<T>(p, b * p.n + begin, i, count, [&](V logit, Mask x_t, Mask x_start, int u) {
        values.v[u] = bit_divergence<L, kMixture>(logit, x_t, x_start, row);
      });
      sum.set(i / Group<T>::kSize, values, count - i);
    }
    static_cast<T*>(p.partials)[b * p.partial_stride + block % per_sample] =
        sum.total(count, per_sample == 1);
  }
}

template <class T, bool kMixture>
__attribute__((noinline)) void bits_bound_grad_blocks(const BitsBoundParams& p, int64_t first,
                                                      int64_t last) {
  using L = MathLanes<T>;
  using V = typename Group<T>::V;
  using Mask = Vector<MaskOf<T>, kLanes<T>>;
  constexpr int kGroup = Group<T>::kSize;
  const int64_t per_sample = blocks_per_sample(p.n), size = size_of(p.gradient.dtype);
  T row[kBitsColumns];
  for (int64_t block = first; block < last; ++block) {
    const int64_t b = block / per_sample, begin = block % per_sample * kBlock;
    const int64_t count = p.n - begin < kBlock ? p.n - begin : kBlock, element = b * p.n + begin;
    read_row(p, b, row);
    const T weight = static_cast<const T*>(p.gradients)[b] * row[kBitsScale];
    for (int64_t i = 0; i < count; i += kGroup) {
      Group<T> slopes;
      each_register<T>(p, element, i, count, [&](V logit, Mask x_t, Mask x_start, int u) {
        slopes.v[u] = bit_divergence_slope<L, kMixture>(logit, x_t, x_start, row) * weight;
      });
      char* to = static_cast<char*>(p.gradient.data) + (element + i) * size;
      alignas(64) char tail[kGroup * 8];
      const bool whole = i + kGroup <= count;
      store_group(Place{whole ? to : tail, p.gradient.dtype}, 0, slopes);
      if (!whole) memcpy(to, tail, static_cast<size_t>((count - i) * size));
    }
  }
}

// The partial sums of samples first .. last - 1 to their results.
template <class T>
void bits_bound_sum_as(const BitsBoundParams& p, int64_t first, int64_t last) {
  T row[kBitsColumns];
  for (int64_t b = first; b < last; ++b) {
    T* sums = static_cast<T*>(p.partials) + b * p.partial_stride;
    read_row(p, b, row);
    static_cast<T*>(p.results)[b] = pairwise_sum(sums, blocks_per_sample(p.n)) * row[kBitsScale];
  }
}

template <class T>
void bits_bound_as(const BitsBoundParams& p, int64_t first, int64_t last) {
  if (p.mixture)
    bits_bound_blocks<T, true>(p, first, last);
  else
    bits_bound_blocks<T, false>(p, first, last);
}

template <class T>
void bits_bound_grad_as(const BitsBoundParams& p, int64_t first, int64_t last) {
  if (p.mixture)
    bits_bound_grad_blocks<T, true>(p, first, last);
  else
    bits_bound_grad_blocks<T, false>(p, first, last);
}

inline void bits_bound(const BitsBoundParams& p, int64_t first, int64_t last) {
  if (p.table_dtype == DType::f64)
    bits_bound_as<double>(p, first, last);
  else
    bits_bound_as<float>(p, first, last);
}

inline void bits_bound_sum(const BitsBoundParams& p, int64_t first, int64_t last) {
  if (p.table_dtype == DType::f64)
    bits_bound_sum_as<double>(p, first, last);
  else
    bits_bound_sum_as<float>(p, first, last);
}

inline void bits_bound_grad(const BitsBoundParams& p, int64_t first, int64_t last) {
  if (p.table_dtype == DType::f64)
    bits_bound_grad_as<double>(p, first, last);
  else
    bits_bound_grad_as<float>(p, first, last);
}

}  // namespace fastdiff::FASTDIFF_ISA
