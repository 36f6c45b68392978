// Losses and bounds, and their gradients (fastdiff/ops/loss.py), over blocks of a sample.
//
// What depends on the sample but not on the element (its row, which columns are used, which
// functions are applied) is worked out once per sample; then group by group of registers the
// columns are read, combined and reduced. Noise is made into the cache for one block.
#pragma once

#include <cmath>

#include "../include/loss.h"
#include "sources.h"
#include "sums.h"

namespace fastdiff::FASTDIFF_ISA {

// ---- functions of a group, chosen once per sample

template <class T>
using RhoOf = void (*)(Group<T>& e, T delta);

template <class T, int kRho, bool kSlope>
void rho_of(Group<T>& e, T delta) {
  using L = MathLanes<T>;
#pragma GCC unroll 8
  for (int u = 0; u < kUnroll; ++u)
    e.v[u] = kSlope ? rho_slope<L, kRho>(e.v[u], delta) : rho_value<L, kRho>(e.v[u], delta);
}

template <class T, bool kSlope>
RhoOf<T> rho_for(int rho) {
  static constexpr RhoOf<T> kFunctions[] = {rho_of<T, kSquare, kSlope>, rho_of<T, kAbs, kSlope>,
                                            rho_of<T, kHuber, kSlope>,
                                            rho_of<T, kPseudoHuber, kSlope>};
  return kFunctions[rho];
}

// d becomes the bound; or its derivative by d, and v that by the log variance.
template <class T>
using BoundOf = void (*)(const BoundRow<T>& row, const Group<T>& x, Group<T>& d, Group<T>& v);

template <class T, BoundKind kKind, bool kLearned, bool kSlopes>
void bound_of(const BoundRow<T>& row, const Group<T>&, Group<T>& d, Group<T>& v) {
  using L = MathLanes<T>;
  using V = typename Group<T>::V;
#pragma GCC unroll 1
  for (int u = 0; u < kUnroll; ++u) {
    const V v_u = kLearned ? v.v[u] : V{};
    if constexpr (kSlopes) {
      const BoundSlopes<L> slopes = bound_slopes<L, kKind, kLearned>(row, V{}, d.v[u], v_u);
      d.v[u] = slopes.by_d;
      if constexpr (kLearned) v.v[u] = slopes.by_l;
    } else {
      d.v[u] = bound_value<L, kKind, kLearned>(row, V{}, d.v[u], v_u);
    }
  }
}

// The discretized likelihood is 300 instructions of few chains, more than the processor looks
// ahead: part by part of a group it takes 1.9 ns an element with AVX-512, register by register 3.5.
template <class T, bool kLearned, bool kSlopes>
void discretized_of(const BoundRow<T>& row, const Group<T>& x, Group<T>& d, Group<T>& v) {
  using L = MathLanes<T>;
  using V = typename Group<T>::V;
  V s[kUnroll], below[kUnroll], above[kUnroll], inside[kUnroll];
  Bin<L> bin[kUnroll];
  BinExp<L> e[kUnroll];
#pragma GCC unroll 1
  for (int u = 0; u < kUnroll; ++u) s[u] = inverse_std<L, kLearned>(row, kLearned ? v.v[u] : V{});
#pragma GCC unroll 1
  for (int u = 0; u < kUnroll; ++u) bin[u] = Bin<L>::of(d.v[u], s[u]);
#pragma GCC unroll 1
  for (int u = 0; u < kUnroll; ++u) e[u] = BinExp<L>::of(bin[u]);
#pragma GCC unroll 1
  for (int u = 0; u < kUnroll; ++u) below[u] = softplus<L>(-bin[u].upper, e[u].upper);
#pragma GCC unroll 1
  for (int u = 0; u < kUnroll; ++u) above[u] = softplus<L>(bin[u].lower, e[u].lower);
#pragma GCC unroll 1
  for (int u = 0; u < kUnroll; ++u) inside[u] = log_one_minus_exp<L>(bin[u].width, e[u].width);
#pragma GCC unroll 1
  for (int u = 0; u < kUnroll; ++u) {
    const V nll = discretized_nll<L>(x.v[u], below[u], above[u], inside[u], row.floor);
    if constexpr (kSlopes) {
      const BoundSlopes<L> slopes =
          discretized_nll_slopes<L>(x.v[u], bin[u], e[u], s[u], nll, row.floor);
      d.v[u] = slopes.by_d;
      if constexpr (kLearned) v.v[u] = slopes.by_l;
    } else {
      d.v[u] = nll;
    }
  }
}

template <class T, bool kSlopes>
BoundOf<T> bound_for(BoundKind kind, bool learned) {
  static constexpr BoundOf<T> kFunctions[3][2] = {
      {bound_of<T, BoundKind::kClosed, false, kSlopes>,
       bound_of<T, BoundKind::kClosed, true, kSlopes>},
      {discretized_of<T, false, kSlopes>, discretized_of<T, true, kSlopes>},
      {bound_of<T, BoundKind::kDensity, false, kSlopes>,
       bound_of<T, BoundKind::kDensity, true, kSlopes>}};
  return kFunctions[static_cast<int>(kind)][learned];
}

// ---- what most training runs, fast enough for the memory system: squares of the difference of two
// tensors.

// e = a first + b second, in memory of types A and B.
template <class A, class B>
FD_HD void weighted_difference(const A* first, const B* second, float a, float b, Group<float>& e) {
  Group<float> other;
  load_group(first, e);
  load_group(second, other);
#pragma GCC unroll 8
  for (int u = 0; u < kUnroll; ++u) e.v[u] = a * e.v[u] + b * other.v[u];
}

// Function<A, B>::run for two dtypes; null for float64.
template <template <class, class> class Function, class A>
auto for_second(DType b) -> decltype(&Function<A, float>::run) {
  if (b == DType::f32) return &Function<A, float>::run;
  if (b == DType::bf16) return &Function<A, bf16_t>::run;
  return b == DType::f16 ? &Function<A, f16_t>::run : nullptr;
}
template <template <class, class> class Function>
auto for_types(DType a, DType b) -> decltype(&Function<float, float>::run) {
  if (a == DType::f32) return for_second<Function, float>(b);
  if (a == DType::bf16) return for_second<Function, bf16_t>(b);
  return a == DType::f16 ? for_second<Function, f16_t>(b) : nullptr;
}

// ---- what terms are made of

// Not inlined: there are many columns, each of any type.
template <class T>
__attribute__((noinline)) void load_column(const Place& place, int64_t i, Group<T>& group) {
  load_group(place, i, group);
}
template <class T>
__attribute__((noinline)) void store_column(const Place& place, int64_t i, const Group<T>& group) {
  store_group(place, i, group);
}

// One group of every column, as far as it is used.
template <class T>
struct LossColumns {
  Group<T> x, y, o, c, z, v;
  Group<T> unclamped;  // c before the clamp
};

template <class T>
class LossReader {
 public:
  explicit LossReader(const LossParams& p) : p_(p) {
    const int64_t between = p.learned ? 2 * p.n : p.n;
    if (p.x.data) sources_[kX].connect(p.x, p.n, 0);
    if (p.y.data) sources_[kY].connect(p.y, p.n, 0);
    sources_[kO].connect(p.model_output[0], between, 0);
    if (p.model_outputs == 2) sources_[kConditional].connect(p.model_output[1], between, 0);
    if (p.learned) sources_[kV].connect(p.model_output[p.model_outputs - 1], between, p.n);
    if (p.noise.data) sources_[kZ].connect(p.noise, p.n, 0);
    if (p.seeded) sources_[kZ].here.dtype = noise_storage(p.noise_dtype);
  }

  // The row of sample b, and where its noise comes from.
  void begin_sample(int64_t b) {
    sample = b;
    const int64_t index = p_.rows[b * p_.rows_stride];
    const bool inside = index >= 0 && index < p_.table_rows;
    const T* row = static_cast<const T*>(p_.table) + (inside ? index : 0) * kLossColumns;
    for (int k = 0; k < kLossColumns; ++k) entries[k] = inside ? row[k] : static_cast<T>(NAN);
    bound = BoundRow<T>::of([this](LossColumn column) { return entries[column]; });
    guidance = p_.guidance_scale ? static_cast<T>(p_.guidance_scale[b * p_.guidance_stride])
                                 : static_cast<T>(0);
    draw_ = {noise_key(p_.keys, p_.seed, p_.sample_offset, b), static_cast<uint32_t>(p_.step),
             static_cast<uint32_t>(p_.stream)};
  }

  BoundKind kind() const {
    if (p_.density) return BoundKind::kDensity;
    return bound.discretized ? BoundKind::kDiscretized : BoundKind::kClosed;
  }

  // Which columns the sample's terms need: e, d, x - c, and the log variance.
  void use(bool e, bool d, bool x_start, bool v) {
    const int error = e ? p_.error : 0, mean = d || p_.makes ? p_.bound : 0;
    const bool c = (error | mean) & 8 || x_start;
    const int clamp = c ? p_.clamp : 0;
    sources_[kX].used =
        !p_.makes && ((error | mean) & 1 || x_start || (d && kind() == BoundKind::kDiscretized));
    sources_[kY].used = (error | mean) & 2 || clamp & 1;
    sources_[kO].used = (error | mean) & 4 || clamp & 2;
    sources_[kConditional].used = sources_[kO].used && p_.model_outputs == 2;
    sources_[kZ].used = error & 16 || p_.makes;
    sources_[kV].used = v || (p_.makes && p_.learned);
    clamps_ = c;
  }

  // Elements begin.. of the sample come next: `count`, calculated as `padded`, whole groups. Memory
  // at `written`, if any, is about to be written in elements of that size.
  void seek(int64_t begin, int64_t count, int64_t padded, const char* written = nullptr,
            int64_t size = 0) {
    Ahead ahead;
    if (written && count == padded) ahead.add(written, size);
    for (int k = 0; k < kSources; ++k)
      if (sources_[k].used && sources_[k].data)
        sources_[k].template find<T>(sample, begin, count,
                                     count < padded ? tail_[k].bytes : nullptr, ahead);
    if (!sources_[kZ].used || sources_[kZ].data) return;
    sources_[kZ].here.data = reinterpret_cast<char*>(noise_);
    fill_noise(p_.noise_dtype, draw_, static_cast<uint32_t>(begin / 4), noise_, padded, ahead);
  }

  // The columns of the group at element i after where it was sought, x among them where it is read.
  FD_HD void read(int64_t i, LossColumns<T>& columns) const {
    if (sources_[kX].used) load_column(sources_[kX].here, i, columns.x);
    if (sources_[kY].used) load_column(sources_[kY].here, i, columns.y);
    if (sources_[kZ].used) load_column(sources_[kZ].here, i, columns.z);
    if (sources_[kV].used) load_column(sources_[kV].here, i, columns.v);
    if (sources_[kO].used) load_column(sources_[kO].here, i, columns.o);
    if (sources_[kConditional].used) {
      Group<T> conditional;
      load_column(sources_[kConditional].here, i, conditional);
#pragma GCC unroll 8
      for (int u = 0; u < kUnroll; ++u)
        columns.o.v[u] = columns.o.v[u] + guidance * (conditional.v[u] - columns.o.v[u]);
    }
    if (!clamps_) return;
    sum(p_.clamp, {kClampY, kClampO}, {&columns.y, &columns.o}, columns.unclamped);
    const Clamp<T> clamp{entries[kLossLow], entries[kLossHigh]};
#pragma GCC unroll 8
    for (int u = 0; u < kUnroll; ++u) columns.c.v[u] = clamp(columns.unclamped.v[u]);
  }

  // x = sigma z - D . [y, o, c], not yet rounded.
  FD_HD void make_x(LossColumns<T>& columns) const {
    Group<T> mean;
    sum(p_.bound & ~1, {kBoundX, kBoundY, kBoundO, kBoundC},
        {&columns.x, &columns.y, &columns.o, &columns.c}, mean);
    const T sigma = entries[kSigma];
    if (p_.learned) return make_x_of_variance(mean, sigma, columns);
#pragma GCC unroll 8
    for (int u = 0; u < kUnroll; ++u) columns.x.v[u] = -mean.v[u] + sigma * columns.z.v[u];
  }

  FD_HD void error(const LossColumns<T>& columns, Group<T>& e) const {
    sum(p_.error, {kErrorX, kErrorY, kErrorO, kErrorC, kErrorZ},
        {&columns.x, &columns.y, &columns.o, &columns.c, &columns.z}, e);
  }

  // The two columns of an error that has no others, unless they have to be combined first.
  struct Difference {
    const Place* first = nullptr;
    const Place* second = nullptr;
    T a = 0, b = 0;
  };
  Difference difference() const {
    if (p_.terms != kErrorTerm || p_.rho != kSquare || p_.error & 8 || sources_[kConditional].used)
      return {};
    constexpr int kOrder[] = {kX, kY, kO, kO, kZ};
    Difference result;
    int found = 0;
    for (int k = 0; k < 5; ++k) {
      if (!(p_.error >> k & 1)) continue;
      const T a = entries[kErrorX + k];
      const Place* place = &sources_[kOrder[k]].here;
      if (found == 0) result.first = place, result.a = a;
      if (found == 1) result.second = place, result.b = a;
      ++found;
    }
    return found == 2 ? result : Difference{};
  }

  FD_HD void deviation(const LossColumns<T>& columns, Group<T>& d) const {
    sum(p_.bound, {kBoundX, kBoundY, kBoundO, kBoundC},
        {&columns.x, &columns.y, &columns.o, &columns.c}, d);
  }

  int64_t sample = 0;
  T entries[kLossColumns];
  BoundRow<T> bound;
  T guidance;

 private:
  enum { kX, kY, kO, kConditional, kV, kZ, kSources };
  using V = typename Group<T>::V;

  void make_x_of_variance(const Group<T>& mean, T sigma, LossColumns<T>& columns) const {
    const T low = entries[kLogScaleLow], high = entries[kLogScaleHigh];
#pragma GCC unroll 8
    for (int u = 0; u < kUnroll; ++u) {
      const V scale = learned_scale<MathLanes<T>>(columns.v.v[u], low, high);
      columns.x.v[u] = -mean.v[u] + sigma * scale * columns.z.v[u];
    }
  }

  // Starts at -0, the identity of addition.
  template <int kCount>
  FD_HD void sum(int mask, const LossColumn (&coefficients)[kCount],
                 const Group<T>* const (&values)[kCount], Group<T>& result) const {
#pragma GCC unroll 8
    for (int u = 0; u < kUnroll; ++u) result.v[u] = broadcast<V>(static_cast<T>(-0.0));
#pragma GCC unroll 5
    for (int k = 0; k < kCount; ++k) {
      if (!(mask >> k & 1)) continue;
      const T a = entries[coefficients[k]];
#pragma GCC unroll 8
      for (int u = 0; u < kUnroll; ++u) result.v[u] += a * values[k]->v[u];
    }
  }

  const LossParams& p_;
  Source sources_[kSources];
  bool clamps_ = false;
  Draw draw_;
  Tail<T> tail_[kSources];
  alignas(64) float noise_[kBlock + 48];
};

inline char* element_of(const Operand& operand, int64_t element) {
  return static_cast<char*>(operand.data) + element * size_of(operand.dtype);
}

template <class Kernel>
__attribute__((noinline)) void loss_blocks(const LossParams& p, int64_t first, int64_t last) {
  Kernel kernel(p);
  const int64_t per_sample = blocks_per_sample(p.n);
  for (int64_t block = first; block < last; ++block) {
    if (block == first || block % per_sample == 0) kernel.begin_sample(block / per_sample);
    kernel.run(block % per_sample);
  }
  fence_streams();
}

}  // namespace fastdiff::FASTDIFF_ISA
