// Losses and bounds (fastdiff/ops/loss.py) over blocks of a sample.
//
// What depends on the sample but not on the element (its row, which columns are used, which
// functions are applied) is worked out once per sample; then group by group of registers the
// columns are read, combined and reduced. Noise is made into the cache for one block.
#pragma once

#include "loss_columns.h"
#include "pairwise.h"

namespace fastdiff::FASTDIFF_ISA {

static_assert(kBlock == kPiece, "a block leaves one partial sum");

template <class A, class B>
struct SumOfSquares {
  // Whole groups from number `group` on. Slopes are stored where there is memory for them.
  static void run(const Place& first, const Place& second, float a, float b, int64_t count,
                  BlockSum<float>& sum, int64_t group, float* slopes, bool streams) {
    for (int64_t i = 0; i < count; i += Group<float>::kSize, ++group) {
      Group<float> e;
      weighted_difference(reinterpret_cast<const A*>(first.data) + i,
                          reinterpret_cast<const B*>(second.data) + i, a, b, e);
      if (slopes) {
        Group<float> slope;
#pragma GCC unroll 8
        for (int u = 0; u < kUnroll; ++u) slope.v[u] = e.v[u] + e.v[u];
        if (streams)
          stream_group(slopes + i, slope);
        else
          store_group(slopes + i, slope);
      }
#pragma GCC unroll 8
      for (int u = 0; u < kUnroll; ++u) e.v[u] *= e.v[u];
      sum.set(group, e, Group<float>::kSize);
    }
  }
};

template <class T>
class LossKernel {
 public:
  explicit LossKernel(const LossParams& p)
      : p_(p), reader_(p), streams_(beyond_caches(p.slopes, p.batch, p.n * sizeof(T))) {}

  void begin_sample(int64_t b) {
    reader_.begin_sample(b);
    const bool bound = p_.terms & kBoundTerm;
    reader_.use(p_.terms & kErrorTerm, bound, p_.terms & kXStartTerm, bound && p_.learned);
    rho_ = rho_for<T, false>(p_.rho);
    slope_ = rho_for<T, true>(p_.rho);
    bound_ = bound_for<T, false>(reader_.kind(), p_.learned);
    difference_ = reader_.difference();
    if (std::is_same_v<T, float> && difference_.first)
      squares_ = for_types<SumOfSquares>(difference_.first->dtype, difference_.second->dtype);
  }

  // One block: its sum of each term.
  void run(int64_t block) {
    const int64_t begin = block * kBlock;
    const int64_t count = p_.n - begin < kBlock ? p_.n - begin : kBlock;
    const int64_t whole = count / kGroup * kGroup;
    if (whole > 0) run_groups(begin, whole, whole, 0);
    if (whole < count) run_groups(begin + whole, count - whole, kGroup, whole / kGroup);
    T* partials = static_cast<T*>(p_.partials) + reader_.sample * p_.pieces + block;
    int term = 0;
    for (int k = 0; k < 3; ++k)
      if (p_.terms >> k & 1)
        partials[term++ * p_.batch * p_.pieces] = sums_[k].total(count, p_.pieces == 1);
  }

 private:
  static constexpr int kGroup = Group<T>::kSize;

  __attribute__((noinline)) void run_groups(int64_t begin, int64_t count, int64_t padded,
                                            int64_t group) {
    const bool tail = count < padded;
    const int64_t element = reader_.sample * p_.n + begin;
    T* const slopes = p_.keeps_slopes ? static_cast<T*>(p_.slopes) + element : nullptr;
    reader_.seek(begin, count, padded, streams_ ? nullptr : reinterpret_cast<char*>(slopes),
                 sizeof(T));
    if constexpr (std::is_same_v<T, float>)
      if (squares_ && !tail)
        return squares_(*difference_.first, *difference_.second, difference_.a, difference_.b,
                        padded, sums_[0], group, slopes, streams_);
    Place made{};
    if (p_.makes) made = {tail ? made_tail_.bytes : element_of(p_.made, element), p_.made.dtype};
    for (int64_t i = 0; i < padded; i += kGroup, ++group) {
      LossColumns<T> columns;
      reader_.read(i, columns);
      if (p_.makes) {
        reader_.make_x(columns);
        store_column(made, i, columns.x);
        load_column(made, i, columns.x);
      }
      const int64_t valid = tail ? count : kGroup;
      Group<T> value;
      if (p_.terms & kErrorTerm) {
        reader_.error(columns, value);
        if (slopes) {
          Group<T> slope = value;
          slope_(slope, reader_.entries[kDelta]);
          store_group(tail ? reinterpret_cast<T*>(slopes_tail_.bytes) : slopes + i, slope);
        }
        rho_(value, reader_.entries[kDelta]);
        sums_[0].set(group, value, valid);
      }
      if (p_.terms & kBoundTerm) {
        reader_.deviation(columns, value);
        bound_(reader_.bound, columns.x, value, columns.v);
        sums_[1].set(group, value, valid);
      }
      if (p_.terms & kXStartTerm) {
#pragma GCC unroll 8
        for (int u = 0; u < kUnroll; ++u) {
          const auto difference = columns.x.v[u] - columns.c.v[u];
          value.v[u] = difference * difference;
        }
        sums_[2].set(group, value, valid);
      }
    }
    if (p_.makes && tail)
      memcpy(element_of(p_.made, element), made.data,
             static_cast<size_t>(count * size_of(made.dtype)));
    if (slopes && tail) memcpy(slopes, slopes_tail_.bytes, static_cast<size_t>(count) * sizeof(T));
  }

  const LossParams& p_;
  LossReader<T> reader_;
  const bool streams_;  // slopes go past the caches
  RhoOf<T> rho_, slope_;
  BoundOf<T> bound_;
  typename LossReader<T>::Difference difference_;
  decltype(&SumOfSquares<float, float>::run) squares_ = nullptr;
  BlockSum<T> sums_[3];
  Tail<T> made_tail_, slopes_tail_;
};

inline void loss(const LossParams& p, int64_t first, int64_t last) {
  if (p.table_dtype == DType::f64)
    loss_blocks<LossKernel<double>>(p, first, last);
  else
    loss_blocks<LossKernel<float>>(p, first, last);
}

template <class T>
void loss_results_as(const LossParams& p) {
  constexpr LossColumn kScales[] = {kErrorScale, kBoundScale, kXStartScale};
  T* partials = static_cast<T*>(p.partials);
  T* results = static_cast<T*>(p.results);
  for (int k = 0; k < 3; ++k) {
    if (!(p.terms >> k & 1)) continue;
    for (int64_t b = 0; b < p.batch; ++b, partials += p.pieces, ++results) {
      const T sum = pairwise_sum(partials, blocks_per_sample(p.n));
      const int64_t index = p.rows[b * p.rows_stride];
      const bool inside = index >= 0 && index < p.table_rows;
      const T* row = static_cast<const T*>(p.table) + (inside ? index : 0) * kLossColumns;
      const T scaled = sum * row[kScales[k]];
      const T result = k == 2 ? scaled : scaled + row[kScales[k] + 1];
      *results = inside ? result : static_cast<T>(NAN);
    }
  }
}

// The results, once every block has left its sums.
inline void loss_results(const LossParams& p) {
  if (p.table_dtype == DType::f64)
    loss_results_as<double>(p);
  else
    loss_results_as<float>(p);
}

}  // namespace fastdiff::FASTDIFF_ISA
