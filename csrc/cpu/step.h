// The fused solver step (fastdiff/ops/step.py) over blocks of a sample.
//
// A step is data: which columns exist and their coefficients. So a row of the table is compacted,
// once per sample, into lists of (coefficient, source) without the zeros, and a list is evaluated a
// group of registers at a time. Sources are read in place where they lie in memory in any type;
// what has to be made first (noise, the clamp node, the scale of learned variance) is made for one
// block into the cache.
#pragma once

#include "../include/exp.h"
#include "randn.h"

namespace fastdiff::FASTDIFF_ISA {

constexpr int kMaxColumns = kMaxStates + 2 + kMaxDraws;  // S, o, c, z

// One addend of a row: a * source; with `base`, guidance first; with `scale`, a * scale * source.
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

// Memory of one thread for one block. The odd sizes keep the arrays out of each other's way in the
// sets of the first-level cache.
template <class T>
struct StepScratch {
  struct alignas(64) Raw {
    char bytes[kBlock * 8 + 192];
  };
  Raw input[kMaxColumns + 2], output[kMaxOutputs + 2], staged[kMaxOutputs];
  alignas(64) float noise[kMaxDraws][kBlock + 48];
  alignas(64) T clamped[kBlock + 16], scale[kBlock + 16];
};

template <class T>
class StepKernel {
 public:
  StepKernel(const StepParams& p, StepScratch<T>& scratch) : p_(p), scratch_(scratch) {
    for (int k = 0; k < p.states; ++k) sources_[kState + k].whole = &p.state[k];
    for (int k = 0; k < p.model_outputs; ++k) sources_[kModel + k].whole = &p.model_output[k];
    if (p.learned) sources_[kVariance].whole = &p.model_output[p.model_outputs - 1];
    for (int k = 0; k < p.draws; ++k) {
      if (!p.seeded) sources_[kNoise + k].whole = &p.noise[k];
      sources_[kNoise + k].here = {reinterpret_cast<char*>(scratch.noise[k]), DType::f32};
    }
    sources_[kClamped].here = {reinterpret_cast<char*>(scratch.clamped), table_dtype()};
    staged_ = p.outputs > 1 && overwrites_an_input();
  }

  // Everything that depends on the sample but not on the element.
  void begin_sample(int64_t b) {
    sample_ = b;
    for (Source& source : sources_) source.used = false;
    const int64_t row = p_.rows[b * p_.rows_stride];
    const bool inside = row >= 0 && row < p_.table_rows;
    const int64_t index = inside ? row : 0;
    T nan_row[kMaxWidth];
    const T* table = static_cast<const T*>(p_.table) + index * p_.table_width;
    if (!inside) {
      for (int64_t k = 0; k < p_.table_width; ++k) nan_row[k] = static_cast<T>(NAN);
      table = nan_row;
    }
    low_ = table[0];
    high_ = table[1];
    input_scale_ = table[2];
    log_low_ = table[3];
    log_high_ = table[4];
    if (p_.guidance_scale)
      guidance_ = static_cast<T>(p_.guidance_scale[b * p_.guidance_stride]);
    if (p_.threshold) {
      high_ = static_cast<T>(p_.threshold[b * p_.threshold_stride]);
      low_ = -high_;
      inverse_bound_ = static_cast<T>(1) / high_;
    }
    const T* coefficients = table + kHeader;
    clamp_.count = 0;
    if (p_.clamp_mask >= 0)
      compact(p_.clamp_mask, /*with_clamped=*/false, coefficients, clamp_);
    coefficients += p_.states + 1 + p_.draws;
    for (int r = 0; r < p_.outputs; ++r, coefficients += p_.states + 2 + p_.draws)
      compact(p_.output_mask[r], /*with_clamped=*/true, coefficients, rows_[r]);
    if (!p_.seeded) return;
    for (int k = 0; k < p_.draws; ++k) {
      const int64_t* draw = p_.draw_table ? p_.draw_table + (index * p_.draws + k) * 2 : nullptr;
      draws_[k] = {noise_key(p_.keys, p_.seed, p_.sample_offset, b),
                   static_cast<uint32_t>(draw ? draw[0] : p_.step),
                   static_cast<uint32_t>(draw ? draw[1] : p_.stream)};
    }
  }

  void run_block(int64_t begin) {
    const int count = static_cast<int>(p_.n - begin < kBlock ? p_.n - begin : kBlock);
    // A last partial group is computed whole, between copies of what it reads and writes.
    const bool partial = count % kGroup != 0;
    const int padded = (count + kGroup - 1) / kGroup * kGroup;
    for (int k = 0; k < kSources; ++k) enter(k, begin, count, partial ? padded : 0);
    make_scale(padded);
    make_clamped(padded);
    Place targets[kMaxOutputs], inputs[2];
    for (int r = 0; r < p_.outputs; ++r)
      targets[r] = partial ? buffer(r, p_.out[r].dtype)
                           : at(p_.out[r], sample_ * p_.n + begin);
    const int copies = p_.model_input.data ? p_.model_input_copies : 0;
    for (int k = 0; k < copies; ++k)
      inputs[k] = partial ? buffer(kMaxOutputs + k, p_.model_input.dtype)
                          : at(p_.model_input, (k * p_.batch + sample_) * p_.n + begin);
    if (staged_)
      write_staged(targets, inputs, copies, padded);
    else
      write(targets, inputs, copies, padded);
    if (!partial) return;
    for (int r = 0; r < p_.outputs; ++r)
      leave(targets[r], p_.out[r], sample_ * p_.n + begin, count);
    for (int k = 0; k < copies; ++k)
      leave(inputs[k], p_.model_input, (k * p_.batch + sample_) * p_.n + begin, count);
  }

 private:
  static constexpr int kGroup = Group<T>::kSize;
  static_assert(kBlock % kGroup == 0, "a block is whole groups");
  static constexpr int kMaxWidth = kHeader + kMaxColumns * (kMaxOutputs + 1);
  static constexpr int kState = 0, kModel = kMaxStates, kVariance = kModel + 2,
                       kClamped = kVariance + 1, kNoise = kClamped + 1,
                       kSources = kNoise + kMaxDraws;

  struct Source {
    const Operand* whole = nullptr;  // null: made per block
    Place here{};                    // the current block
    bool used = false;
  };

  static constexpr DType table_dtype() {
    return std::is_same_v<T, double> ? DType::f64 : DType::f32;
  }

  static Place at(const Operand& operand, int64_t element) {
    return {static_cast<char*>(operand.data) + element * size_of(operand.dtype), operand.dtype};
  }

  Place buffer(int k, DType dtype) { return {scratch_.output[k].bytes, dtype}; }

  static void leave(const Place& from, const Operand& operand, int64_t element, int count) {
    memcpy(at(operand, element).data, from.data, count * size_of(operand.dtype));
  }

  // Whether rows cannot be stored one after another because a later one reads what is overwritten.
  bool overwrites_an_input() const {
    const auto reads = [this](const void* data) {
      for (const Source& source : sources_)
        if (source.whole && source.whole->data == data) return true;
      return false;
    };
    for (int r = 0; r < p_.outputs; ++r)
      if (reads(p_.out[r].data)) return true;
    return p_.model_input.data && reads(p_.model_input.data);
  }

  void compact(int32_t mask, bool with_clamped, const T* coefficients, Sum<T>& sum) {
    sum.count = 0;
    const bool guided = p_.model_outputs == 2;
    const int columns = p_.states + 1 + with_clamped + p_.draws;
    for (int column = 0; column < columns; ++column) {
      const T a = coefficients[column];
      if (!(mask >> column & 1) || a == 0) continue;
      int source = kState + column;
      const Place* base = nullptr;
      const T* scale = nullptr;
      if (column == p_.states) {
        source = kModel + guided;
        if (guided) base = &use(kModel);
      } else if (column == p_.states + 1 && with_clamped) {
        source = kClamped;
      } else if (column > p_.states) {
        source = kNoise + column - (p_.states + 1 + with_clamped);
        if (p_.learned) {
          use(kVariance);
          scale = scratch_.scale;
        }
      }
      sum.terms[sum.count++] = {a, &use(source), base, scale};
    }
  }

  const Place& use(int k) {
    sources_[k].used = true;
    return sources_[k].here;
  }

  // Points source k at elements begin.. of the sample, or makes it.
  void enter(int k, int64_t begin, int count, int padded) {
    Source& source = sources_[k];
    if (!source.used) return;
    if (!source.whole) {
      if (k >= kNoise)
        fill_noise(p_.noise_dtype, draws_[k - kNoise], static_cast<uint32_t>(begin / 4),
                   scratch_.noise[k - kNoise], count);
      return;
    }
    const bool is_model = k >= kModel && k <= kVariance;
    const int64_t stride = p_.learned && is_model ? 2 * p_.n : p_.n;
    source.here = at(*source.whole, sample_ * stride + (k == kVariance ? p_.n : 0) + begin);
    if (padded == 0) return;
    const int64_t size = size_of(source.whole->dtype);
    char* copy = scratch_.input[k].bytes;
    memcpy(copy, source.here.data, count * size);
    memset(copy + count * size, 0, (padded - count) * size);
    source.here.data = copy;
  }

  void make_scale(int padded) {
    if (!sources_[kVariance].used) return;
    using V = typename Group<T>::V;
    for (int i = 0; i < padded; i += kGroup) {
      Group<T> v;
      load_group(sources_[kVariance].here, i, v);
#pragma GCC unroll 8
      for (int u = 0; u < kUnroll; ++u) {
        const V f = v.v[u] * static_cast<T>(0.5) + static_cast<T>(0.5);
        const V exponent = f * log_high_ + (static_cast<T>(1) - f) * log_low_;
        if constexpr (std::is_same_v<T, double>)
          v.v[u] = exp_f64<MathLanes<T>>(exponent);
        else
          v.v[u] = exp_f32<MathLanes<T>>(exponent);
      }
      load_store_scratch(scratch_.scale + i, v);
    }
  }

  void make_clamped(int padded) {
    if (!sources_[kClamped].used) return;
    using V = typename Group<T>::V;
    const V low = V{} + low_, high = V{} + high_;
    for (int i = 0; i < padded; i += kGroup) {
      Group<T> c;
      evaluate(clamp_, i, c);
#pragma GCC unroll 8
      for (int u = 0; u < kUnroll; ++u) {
        const V at_most = c.v[u] > high ? high : c.v[u];  // NaN passes both
        c.v[u] = c.v[u] < low ? low : at_most;
        if (p_.threshold) c.v[u] = c.v[u] * inverse_bound_;
      }
      load_store_scratch(scratch_.clamped + i, c);
    }
  }

  static FD_HD void load_store_scratch(T* target, const Group<T>& group) {
    store_group(target, group);
  }

  // The sum of the terms for one group, multiplies and adds rounded separately, in column order.
  FD_HD void evaluate(const Sum<T>& sum, int i, Group<T>& result) const {
    using V = typename Group<T>::V;
    Group<T> acc;
#pragma GCC unroll 8
    for (int u = 0; u < kUnroll; ++u) acc.v[u] = V{} + static_cast<T>(-0.0);
    for (int k = 0; k < sum.count; ++k) {
      const Term<T>& term = sum.terms[k];
      Group<T> value;
      load_group(*term.source, i, value);
      if (term.base) {
        Group<T> base;
        load_group(*term.base, i, base);
#pragma GCC unroll 8
        for (int u = 0; u < kUnroll; ++u)
          value.v[u] = base.v[u] + guidance_ * (value.v[u] - base.v[u]);
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

  // The next model input, from out[0] as it was stored.
  FD_HD void write_inputs(const Place& stored, const Place* inputs, int copies, int i,
                          Group<T>& value) const {
    if (copies == 0) return;
    load_group(stored, i, value);
#pragma GCC unroll 8
    for (int u = 0; u < kUnroll; ++u) value.v[u] *= input_scale_;
    for (int k = 0; k < copies; ++k) store_group(inputs[k], i, value);
  }

  void write(const Place* targets, const Place* inputs, int copies, int padded) const {
    for (int r = 0; r < p_.outputs; ++r) {
      for (int i = 0; i < padded; i += kGroup) {
        Group<T> value;
        evaluate(rows_[r], i, value);
        store_group(targets[r], i, value);
        if (r == 0) write_inputs(targets[0], inputs, copies, i, value);
      }
    }
  }

  // Every row of the block before any of it is stored.
  void write_staged(const Place* targets, const Place* inputs, int copies, int padded) {
    Place staged[kMaxOutputs];
    for (int r = 0; r < p_.outputs; ++r) staged[r] = {scratch_.staged[r].bytes, table_dtype()};
    write(staged, nullptr, 0, padded);
    for (int r = 0; r < p_.outputs; ++r) {
      for (int i = 0; i < padded; i += kGroup) {
        Group<T> value;
        load_group(staged[r], i, value);
        store_group(targets[r], i, value);
        if (r == 0) write_inputs(targets[0], inputs, copies, i, value);
      }
    }
  }

  const StepParams& p_;
  StepScratch<T>& scratch_;
  Source sources_[kSources];
  bool staged_;
  int64_t sample_ = -1;
  T low_, high_, input_scale_, log_low_, log_high_, guidance_ = 0, inverse_bound_ = 0;
  Sum<T> clamp_, rows_[kMaxOutputs];
  Draw draws_[kMaxDraws];
};

template <class T>
__attribute__((noinline)) void step_blocks(const StepParams& p, int64_t first, int64_t last) {
  StepScratch<T> scratch;  // not initialized: a block writes what it reads
  StepKernel<T> kernel(p, scratch);
  const int64_t per_sample = blocks_per_sample(p.n);
  int64_t b = first / per_sample, within = first % per_sample;
  for (int64_t block = first; block < last; ++block) {
    if (block == first || within == 0) kernel.begin_sample(b);
    kernel.run_block(within * kBlock);
    if (++within == per_sample) {
      within = 0;
      ++b;
    }
  }
}

inline void step(const StepParams& p, int64_t first, int64_t last) {
  if (p.table_dtype == DType::f64)
    step_blocks<double>(p, first, last);
  else
    step_blocks<float>(p, first, last);
}

}  // namespace fastdiff::FASTDIFF_ISA
