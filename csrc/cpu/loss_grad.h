// Gradients of losses and bounds by the model outputs (fastdiff/ops/loss.py), over blocks of a
// sample: the columns are read and made again as in loss.h.
#pragma once

#include "loss_columns.h"

namespace fastdiff::FASTDIFF_ISA {

// Of squares, stored in the type of o, which is the second column, or the first.
template <class A, class B, class O>
FD_HD void gradient_of_squares(const Place& first, const Place& second, float a, float b,
                               float weight, int64_t count, char* target) {
  for (int64_t i = 0; i < count; i += Group<float>::kSize) {
    Group<float> e;
    weighted_difference(reinterpret_cast<const A*>(first.data) + i,
                        reinterpret_cast<const B*>(second.data) + i, a, b, e);
#pragma GCC unroll 8
    for (int u = 0; u < kUnroll; ++u) e.v[u] = (e.v[u] + e.v[u]) * weight;
    store_group(reinterpret_cast<O*>(target) + i, e);
  }
}
template <class A, class B>
struct ByFirst {
  static void run(const Place& first, const Place& second, float a, float b, float weight,
                  int64_t count, char* target) {
    gradient_of_squares<A, B, A>(first, second, a, b, weight, count, target);
  }
};
template <class A, class B>
struct BySecond {
  static void run(const Place& first, const Place& second, float a, float b, float weight,
                  int64_t count, char* target) {
    gradient_of_squares<A, B, B>(first, second, a, b, weight, count, target);
  }
};

template <class T>
class LossGradKernel {
 public:
  explicit LossGradKernel(const LossParams& p) : p_(p), reader_(p) {}

  void begin_sample(int64_t b) {
    reader_.begin_sample(b);
    const T* results_grad = static_cast<const T*>(p_.results_grad) + b;
    const T* entries = reader_.entries;
    const bool through_c = p_.clamp >= 0 && p_.clamp & 2;
    error_ = bound_mean_ = x_start_ = {};
    bool learns = false;
    if (p_.terms & kErrorTerm) {
      error_ =
          GradFactor<T>::of(*results_grad * entries[kErrorScale], p_.error & 4, entries[kErrorO],
                            through_c && p_.error & 8, entries[kErrorC], entries[kClampO]);
      results_grad += p_.batch;
    }
    if (p_.terms & kBoundTerm) {
      const T weight = *results_grad * entries[kBoundScale];
      if (!p_.frozen)
        bound_mean_ =
            GradFactor<T>::of(weight, p_.bound & 4, entries[kBoundO], through_c && p_.bound & 8,
                              entries[kBoundC], entries[kClampO]);
      learns = p_.learned;
      variance_weight_ = weight * entries[kLogVariance1];
      results_grad += p_.batch;
    }
    if (p_.terms & kXStartTerm && through_c)
      x_start_ = GradFactor<T>::of(*results_grad * entries[kXStartScale], false, static_cast<T>(0),
                                   true, static_cast<T>(-1), entries[kClampO]);
    bound_used_ = bound_mean_.used || learns;
    reader_.use(error_.used, bound_used_, x_start_.used, learns);
    learns_ = learns;
    rho_ = rho_for<T, true>(p_.rho);
    bound_ = bound_for<T, true>(reader_.kind(), p_.learned);
    choose_squares();
  }

  void run(int64_t block) {
    const int64_t begin = block * kBlock;
    const int64_t count = p_.n - begin < kBlock ? p_.n - begin : kBlock;
    const int64_t whole = count / kGroup * kGroup;
    if (whole > 0) run_groups(begin, whole, whole);
    if (whole < count) run_groups(begin + whole, count - whole, kGroup);
  }

 private:
  static constexpr int kGroup = Group<T>::kSize;
  using V = typename Group<T>::V;

  void choose_squares() {
    squares_ = nullptr;
    if constexpr (std::is_same_v<T, float>) {
      difference_ = reader_.difference();
      const DType type = p_.model_output[0].dtype;
      if (!difference_.first || !error_.used || p_.learned || p_.grad[0].dtype != type) return;
      const DType first = difference_.first->dtype, second = difference_.second->dtype;
      const bool o_is_first = !(p_.error & 3);
      squares_ =
          o_is_first ? for_types<ByFirst>(first, second) : for_types<BySecond>(first, second);
    }
  }

  __attribute__((noinline)) void run_groups(int64_t begin, int64_t count, int64_t padded) {
    reader_.seek(begin, count, padded);
    const bool tail = count < padded;
    const int64_t between = p_.learned ? 2 * p_.n : p_.n;
    const int64_t element = reader_.sample * between + begin;
    if constexpr (std::is_same_v<T, float>)
      if (squares_ && !tail)
        return squares_(*difference_.first, *difference_.second, difference_.a, difference_.b,
                        error_.inside, padded, element_of(p_.grad[0], element));
    // By o of each model output, and by v of the last.
    Place targets[3];
    const int outputs = p_.model_outputs;
    const Operand& last = p_.grad[outputs - 1];
    for (int k = 0; k < outputs; ++k)
      targets[k] = {element_of(p_.grad[k], element), p_.grad[k].dtype};
    targets[2] = {p_.learned ? element_of(last, element + p_.n) : nullptr, last.dtype};
    char* in_memory[3];
    for (int k = 0; k < 3; ++k) {
      in_memory[k] = targets[k].data;
      if (tail) targets[k].data = tail_[k].bytes;
    }
    for (int64_t i = 0; i < padded; i += kGroup) {
      Group<T> by_o, by_v;
      slopes(i, by_o, by_v);
      store(by_o, i, targets);
      if (p_.learned) store_column(targets[2], i, by_v);
    }
    if (tail)
      for (int k = 0; k < 3; ++k)
        if (k < outputs || (k == 2 && p_.learned))
          memcpy(in_memory[k], targets[k].data,
                 static_cast<size_t>(count * size_of(targets[k].dtype)));
    if (p_.learned && outputs == 2)
      memset(element_of(p_.grad[0], element + p_.n), 0,
             static_cast<size_t>(count * size_of(p_.grad[0].dtype)));
  }

  FD_HD void slopes(int64_t i, Group<T>& by_o, Group<T>& by_v) const {
    LossColumns<T> columns;
    reader_.read(i, columns);
    if (p_.makes) make_x(columns);
    fill(by_o, static_cast<T>(-0.0));  // the identity of addition
    Group<T> slope;
    if (error_.used) {
      reader_.error(columns, slope);
      rho_(slope, reader_.entries[kDelta]);
      add(slope, error_, columns.unclamped, by_o);
    }
    if (bound_used_) {
      reader_.deviation(columns, slope);
      bound_(reader_.bound, columns.x, slope, columns.v);
      if (bound_mean_.used) add(slope, bound_mean_, columns.unclamped, by_o);
    }
    if (x_start_.used) {
#pragma GCC unroll 8
      for (int u = 0; u < kUnroll; ++u) {
        const auto difference = columns.x.v[u] - columns.c.v[u];
        slope.v[u] = difference + difference;
      }
      add(slope, x_start_, columns.unclamped, by_o);
    }
    if (!error_.used && !bound_mean_.used && !x_start_.used) fill(by_o, static_cast<T>(0));
    if (!p_.learned) return;
    if (!learns_) return fill(by_v, static_cast<T>(0));
#pragma GCC unroll 8
    for (int u = 0; u < kUnroll; ++u) by_v.v[u] = columns.v.v[u] * variance_weight_;
  }

  // x that a loss would make is float32 here.
  void make_x(LossColumns<T>& columns) const {
    reader_.make_x(columns);
    alignas(64) float made[kGroup];
    store_group(made, columns.x);
    load_group(made, columns.x);
  }

  static FD_HD void fill(Group<T>& group, T value) {
#pragma GCC unroll 8
    for (int u = 0; u < kUnroll; ++u) group.v[u] = broadcast<V>(value);
  }

  // total += slope * factor
  FD_HD void add(const Group<T>& slope, const GradFactor<T>& factor, const Group<T>& unclamped,
                 Group<T>& total) const {
    const T low = reader_.entries[kLossLow], high = reader_.entries[kLossHigh];
    const V inside = broadcast<V>(factor.inside), at_bound = broadcast<V>(factor.at_bound);
    if (!factor.by_clamp) {
#pragma GCC unroll 8
      for (int u = 0; u < kUnroll; ++u) total.v[u] += slope.v[u] * inside;
      return;
    }
#pragma GCC unroll 8
    for (int u = 0; u < kUnroll; ++u) {
      const V c = unclamped.v[u], not_above = c > high ? at_bound : inside;
      total.v[u] += slope.v[u] * (c < low ? at_bound : not_above);
    }
  }

  FD_HD void store(Group<T>& by_o, int64_t i, const Place* targets) const {
    if (p_.model_outputs == 1) return store_column(targets[0], i, by_o);
    const T g = reader_.guidance;
    Group<T> part;
#pragma GCC unroll 8
    for (int u = 0; u < kUnroll; ++u) part.v[u] = by_o.v[u] * (static_cast<T>(1) - g);
    store_column(targets[0], i, part);
#pragma GCC unroll 8
    for (int u = 0; u < kUnroll; ++u) by_o.v[u] *= g;
    store_column(targets[1], i, by_o);
  }

  const LossParams& p_;
  LossReader<T> reader_;
  typename LossReader<T>::Difference difference_;
  decltype(&BySecond<float, float>::run) squares_;
  GradFactor<T> error_, bound_mean_, x_start_;
  bool bound_used_, learns_;
  T variance_weight_ = 0;
  RhoOf<T> rho_;
  BoundOf<T> bound_;
  Tail<T> tail_[3];
};

inline void loss_grad(const LossParams& p, int64_t first, int64_t last) {
  if (p.table_dtype == DType::f64)
    loss_blocks<LossGradKernel<double>>(p, first, last);
  else
    loss_blocks<LossGradKernel<float>>(p, first, last);
}

}  // namespace fastdiff::FASTDIFF_ISA
