// The fused solver step (fastdiff/ops/step.py) over blocks of a sample.
//
// A step is data: which columns exist and their coefficients. So a row of the table is compacted,
// once per sample, into sums of terms without the zeros (sums.h), and these are evaluated block by
// block. Sources are read in place where they lie in memory; what has to be made first (noise, the
// clamp node, the scale of learned variance) is made into the cache for one block.
#pragma once

#include <cmath>

#include "../include/exp.h"
#include "sources.h"
#include "sums.h"

namespace fastdiff::FASTDIFF_ISA {

// Memory of one thread. The odd sizes keep the arrays out of each other's way in the sets of the
// first-level cache.
template <class T>
struct StepScratch {
  Tail<T> tail_in[kMaxColumns + 2], tail_out[kMaxOutputs + 2];
  alignas(64) float noise[kMaxDraws][kBlock + 48];
  alignas(64) T clamped[kBlock + 16], scale[kBlock + 16];
  alignas(64) char staged[kMaxOutputs][(kBlock + 48) * 8], input[kBlock * 8];
};

// Moves whole registers from the scratch to an aligned place, past the caches.
inline void stream_block(char* to, const char* from, size_t bytes) {
  for (size_t i = 0; i < bytes; i += kRegisterBytes)
    stream_vector(to + i, load_vector<Lanes::U>(from + i));
}

template <class T>
class StepKernel {
 public:
  StepKernel(const StepParams& p, StepScratch<T>& scratch) : p_(p), scratch_(scratch) {
    for (int k = 0; k < p.states; ++k) sources_[kState + k].connect(p.state[k], p.n, 0);
    const int64_t model_stride = p.learned ? 2 * p.n : p.n;
    for (int k = 0; k < p.model_outputs; ++k)
      sources_[kModel + k].connect(p.model_output[k], model_stride, 0);
    if (p.learned)
      sources_[kVariance].connect(p.model_output[p.model_outputs - 1], model_stride, p.n);
    sources_[kClamped].here = place(scratch.clamped);
    for (int k = 0; k < p.draws; ++k) {
      if (p.seeded)
        sources_[kNoise + k].here = {reinterpret_cast<char*>(scratch.noise[k]),
                                     noise_storage(p.noise_dtype)};
      else
        sources_[kNoise + k].connect(p.noise[k], p.n, 0);
    }
  }

  // Everything that depends on the sample but not on the element.
  void begin_sample(int64_t b) {
    const bool same = !p_.rows_stride && !p_.guidance_stride && !p_.threshold_stride;
    if (sample_ < 0 || !same) read_row(b);
    sample_ = b;
    if (!p_.seeded) return;
    for (int k = 0; k < p_.draws; ++k) {
      const int64_t* draw = p_.draw_table ? p_.draw_table + (row_ * p_.draws + k) * 2 : nullptr;
      draws_[k] = {noise_key(p_.keys, p_.seed, p_.sample_offset, b),
                   static_cast<uint32_t>(draw ? draw[0] : p_.step),
                   static_cast<uint32_t>(draw ? draw[1] : p_.stream)};
    }
  }

  // The row of sample b: its coefficients, compacted, and how to evaluate them.
  void read_row(int64_t b) {
    for (Source& source : sources_) source.used = false;
    const int64_t row = p_.rows[b * p_.rows_stride];
    const bool inside = row >= 0 && row < p_.table_rows;
    row_ = inside ? row : 0;
    const T* table = static_cast<const T*>(p_.table) + row_ * p_.table_width;
    T nan_row[kMaxWidth];
    if (!inside) {
      for (T& entry : nan_row) entry = static_cast<T>(NAN);
      table = nan_row;
    }
    clamp_ = {table[0], table[1]};
    input_scale_ = table[2];
    log_low_ = table[3];
    log_high_ = table[4];
    if (p_.guidance_scale) guidance_ = static_cast<T>(p_.guidance_scale[b * p_.guidance_stride]);
    if (p_.threshold) {
      const T bound = static_cast<T>(p_.threshold[b * p_.threshold_stride]);
      clamp_ = {-bound, bound, static_cast<T>(1) / bound};
    }
    const T* coefficients = table + kHeader;
    if (p_.clamp_mask >= 0)
      compact(p_.clamp_mask, /*with_clamped=*/false, coefficients, clamped_sum_);
    coefficients += p_.states + 1 + p_.draws;
    for (int r = 0; r < p_.outputs; ++r, coefficients += p_.states + 2 + p_.draws)
      compact(p_.output_mask[r], /*with_clamped=*/true, coefficients, rows_[r]);
    choose_stores();
  }

  // Elements begin..end-1 of the sample: whole groups in place, and what remains as one group
  // between copies of what it reads and writes.
  void run(int64_t begin, int64_t end) {
    const int64_t stride = one_pass() ? end - begin : kBlock;
    for (; begin < end; begin += stride) {
      const int64_t count = end - begin < stride ? end - begin : stride;
      const int64_t whole = count / kGroup * kGroup;
      if (whole > 0) run_groups(begin, whole, whole);
      if (whole < count) run_groups(begin + whole, count - whole, kGroup);
    }
  }

 private:
  static constexpr int kGroup = Group<T>::kSize;
  static_assert(kBlock % kGroup == 0, "a block is whole groups");
  static constexpr int kMaxWidth = kHeader + kMaxColumns * (kMaxOutputs + 1);
  static constexpr int kState = 0, kModel = kMaxStates, kVariance = kModel + 2,
                       kClamped = kVariance + 1, kNoise = kClamped + 1,
                       kSources = kNoise + kMaxDraws;

  static Place place(float* data) { return {reinterpret_cast<char*>(data), DType::f32}; }
  static Place place(double* data) { return {reinterpret_cast<char*>(data), DType::f64}; }
  static char* at(const Operand& operand, int64_t element) {
    return static_cast<char*>(operand.data) + element * size_of(operand.dtype);
  }

  // Whether a later row reads the input whose place output r takes, so that it has to wait.
  bool read_after(int r) const {
    for (int later = r + 1; later < p_.outputs; ++later)
      for (const Source& source : sources_)
        if (source.data && source.data == p_.out[r].data && reads(rows_[later], &source.here))
          return true;
    return false;
  }

  // Whether to store past the caches: the result, `copies` times as large as the batch, would not
  // fit, and its lines have not been loaded as an input.
  bool streams(const Operand& result, int64_t copies) const {
    for (const Source& source : sources_)
      if (source.data && source.data == result.data) return false;
    return beyond_caches(result.data, copies * p_.batch, p_.n * size_of(result.dtype));
  }

  // How each result is stored: at once, or made in the scratch and moved when all rows are made.
  // The latter also if it goes past the caches and is read again, or is not stored by a uniform
  // sum.
  void choose_stores() {
    streams_input_ = streams(p_.model_input, p_.model_input_copies);
    for (int r = 0; r < p_.outputs; ++r) {
      streams_[r] = streams(p_.out[r], 1);
      staged_[r] = read_after(r) || (streams_[r] && r == 0 && p_.model_input.data);
    }
    choose_uniform();
    for (int r = 0; r < p_.outputs; ++r) staged_[r] |= streams_[r] && !uniform_[r];
  }

  // Which sums have sources of one type. The clamp node may then be in the order of Pack<bf16_t>,
  // provided that all its readers take it so.
  void choose_uniform() {
    clamp_uniform_ = nullptr;
    for (UniformSum& sum : uniform_) sum = nullptr;
    if constexpr (std::is_same_v<T, float>) {
      const Place* clamped = &sources_[kClamped].here;
      const DType clamp_type = common_type(clamped_sum_);
      if (sources_[kClamped].used)
        clamp_uniform_ = uniform_sum_for(clamped_sum_, clamp_type, Mode::kScratch, nullptr);
      const bool packed = clamp_uniform_ && clamp_type == DType::bf16;
      bool all_take_packed = true;
      for (int r = 0; r < p_.outputs; ++r) {
        const bool takes_packed = p_.out[r].dtype == DType::bf16;
        const Mode mode = streams_[r] && !staged_[r] ? Mode::kStream : Mode::kStore;
        uniform_[r] = uniform_sum_for(rows_[r], p_.out[r].dtype, mode,
                                      takes_packed == packed ? clamped : nullptr);
        if (reads(rows_[r], clamped)) all_take_packed &= takes_packed && uniform_[r];
      }
      if (!packed || all_take_packed) return;
      clamp_uniform_ = nullptr;
      for (int r = 0; r < p_.outputs; ++r)
        if (reads(rows_[r], clamped)) uniform_[r] = nullptr;
    }
  }

  // Of all sources, or float32.
  static DType common_type(const Sum<T>& sum) {
    if (sum.count == 0) return DType::f32;
    const DType first = sum.terms[0].source->dtype;
    for (int k = 1; k < sum.count; ++k)
      if (sum.terms[k].source->dtype != first) return DType::f32;
    return first;
  }

  static bool reads(const Sum<T>& sum, const Place* place) {
    for (int k = 0; k < sum.count; ++k)
      if (sum.terms[k].source == place || sum.terms[k].base == place) return true;
    return false;
  }

  void compact(int32_t mask, bool with_clamped, const T* coefficients, Sum<T>& sum) {
    sum.count = 0;
    const bool guided = p_.model_outputs == 2;
    const int first_draw = p_.states + 1 + with_clamped;
    for (int column = 0; column < first_draw + p_.draws; ++column) {
      const T a = coefficients[column];
      if (!(mask >> column & 1) || a == 0) continue;
      Term<T>& term = sum.terms[sum.count++];
      term = {a, nullptr, nullptr, nullptr};
      if (column < p_.states) {
        term.source = use(kState + column);
      } else if (column == p_.states) {
        term.source = use(kModel + guided);
        if (guided) term.base = use(kModel);
      } else if (column < first_draw) {
        term.source = use(kClamped);
      } else {
        term.source = use(kNoise + column - first_draw);
        if (p_.learned) {
          use(kVariance);
          term.scale = scratch_.scale;
        }
      }
    }
  }

  const Place* use(int k) {
    sources_[k].used = true;
    return &sources_[k].here;
  }

  // Whether every element is read and written once, so that blocks would gain nothing.
  bool one_pass() const {
    bool makes = sources_[kClamped].used || sources_[kVariance].used || staged_[0];
    for (int k = 0; k < p_.draws; ++k) makes |= p_.seeded && sources_[kNoise + k].used;
    return !makes && p_.outputs == 1 && !p_.model_input.data;
  }

  // `count` elements, calculated as `padded`, which is whole groups.
  void run_groups(int64_t begin, int64_t count, int64_t padded) {
    const bool tail = count != padded;
    const int64_t element = sample_ * p_.n + begin;
    Ahead ahead;
    for (int k = 0; k < kNoise + (p_.seeded ? 0 : p_.draws); ++k)
      if (sources_[k].used && sources_[k].data)
        sources_[k].template find<T>(sample_, begin, count,
                                     tail ? scratch_.tail_in[k].bytes : nullptr, ahead);
    for (int r = 0; r < p_.outputs; ++r)
      ahead.add(at(p_.out[r], element), size_of(p_.out[r].dtype));
    for (int k = 0; k < p_.draws; ++k) {
      if (!p_.seeded || !sources_[kNoise + k].used) continue;
      const uint32_t counter = static_cast<uint32_t>(begin / 4);
      if (k == 0)
        fill_noise(p_.noise_dtype, draws_[k], counter, scratch_.noise[k], padded, ahead);
      else
        fill_noise(p_.noise_dtype, draws_[k], counter, scratch_.noise[k], padded);
    }
    if (sources_[kVariance].used) make_scale(padded);
    if (sources_[kClamped].used) make_clamped(padded);
    const int copies = p_.model_input.data ? p_.model_input_copies : 0;
    Place targets[kMaxOutputs], inputs[2];
    for (int r = 0; r < p_.outputs; ++r)
      targets[r] = {tail ? scratch_.tail_out[r].bytes : at(p_.out[r], element), p_.out[r].dtype};
    for (int k = 0; k < copies; ++k)
      inputs[k] = {tail ? scratch_.tail_out[kMaxOutputs + k].bytes
                        : at(p_.model_input, k * p_.batch * p_.n + element),
                   p_.model_input.dtype};
    write(targets, inputs, copies, padded);
    if (!tail) return;
    for (int r = 0; r < p_.outputs; ++r)
      memcpy(at(p_.out[r], element), targets[r].data, bytes(count, p_.out[r].dtype));
    for (int k = 0; k < copies; ++k)
      memcpy(at(p_.model_input, k * p_.batch * p_.n + element), inputs[k].data,
             bytes(count, p_.model_input.dtype));
  }

  static size_t bytes(int64_t count, DType dtype) {
    return static_cast<size_t>(count * size_of(dtype));
  }

  void make_scale(int64_t padded) {
    using V = typename Group<T>::V;
    for (int64_t i = 0; i < padded; i += kGroup) {
      Group<T> v;
      load_group(sources_[kVariance].here, i, v);
#pragma GCC unroll 8
      for (int u = 0; u < kUnroll; ++u) {
        v.v[u] = learned_scale<MathLanes<T>>(v.v[u], log_low_, log_high_);
      }
      store_group(scratch_.scale + i, v);
    }
  }

  void make_clamped(int64_t padded) {
    if constexpr (std::is_same_v<T, float>)
      if (clamp_uniform_)
        return clamp_uniform_(clamped_sum_, guidance_, clamp_, padded,
                              reinterpret_cast<char*>(scratch_.clamped));
    for (int64_t i = 0; i < padded; i += kGroup) {
      Group<T> c;
      evaluate(clamped_sum_, guidance_, i, c);
#pragma GCC unroll 8
      for (int u = 0; u < kUnroll; ++u) c.v[u] = clamp_(c.v[u]);
      store_group(scratch_.clamped + i, c);
    }
  }

  void write(const Place* targets, const Place* inputs, int copies, int64_t padded) {
    for (int r = 0; r < p_.outputs; ++r) write_row(r, made(r, targets[r]), padded);
    if (copies > 0) {
      const Place first = made(0, targets[0]), input{scratch_.input, p_.model_input.dtype};
      if (!streams_input_) {
        write_inputs(first, inputs, copies, padded);
      } else {
        write_inputs(first, &input, 1, padded);
        for (int k = 0; k < copies; ++k)
          stream_block(inputs[k].data, input.data, bytes(padded, input.dtype));
      }
    }
    for (int r = 0; r < p_.outputs; ++r) {
      if (!staged_[r]) continue;
      if (streams_[r])
        stream_block(targets[r].data, scratch_.staged[r], bytes(padded, targets[r].dtype));
      else
        memcpy(targets[r].data, scratch_.staged[r], bytes(padded, targets[r].dtype));
    }
  }

  // Where row r is written first.
  Place made(int r, const Place& target) const {
    return staged_[r] ? Place{scratch_.staged[r], target.dtype} : target;
  }

  void write_row(int r, const Place& target, int64_t padded) const {
    if constexpr (std::is_same_v<T, float>)
      if (uniform_[r]) return uniform_[r](rows_[r], guidance_, clamp_, padded, target.data);
    for (int64_t i = 0; i < padded; i += kGroup) {
      Group<T> value;
      evaluate(rows_[r], guidance_, i, value);
      store_group(target, i, value);
    }
  }

  // The next model input, from out[0] as it was stored.
  void write_inputs(const Place& stored, const Place* inputs, int copies, int64_t padded) const {
    for (int64_t i = 0; i < padded; i += kGroup) {
      Group<T> value;
      load_group(stored, i, value);
#pragma GCC unroll 8
      for (int u = 0; u < kUnroll; ++u) value.v[u] *= input_scale_;
      for (int k = 0; k < copies; ++k) store_group(inputs[k], i, value);
    }
  }

  const StepParams& p_;
  StepScratch<T>& scratch_;
  Source sources_[kSources];
  bool staged_[kMaxOutputs], streams_[kMaxOutputs], streams_input_;
  int64_t sample_ = -1, row_ = 0;
  T input_scale_, log_low_, log_high_, guidance_ = 0;
  Clamp<T> clamp_{};
  Sum<T> clamped_sum_{}, rows_[kMaxOutputs];
  UniformSum clamp_uniform_, uniform_[kMaxOutputs];
  Draw draws_[kMaxDraws];
};

template <class T>
__attribute__((noinline)) void step_blocks(const StepParams& p, int64_t first, int64_t last) {
  StepScratch<T> scratch;  // not initialized: a block writes what it reads
  StepKernel<T> kernel(p, scratch);
  const int64_t per_sample = blocks_per_sample(p.n);
  while (first < last) {
    const int64_t b = first / per_sample, within = first % per_sample;
    const int64_t count = per_sample - within < last - first ? per_sample - within : last - first;
    const int64_t end = (within + count) * kBlock;
    kernel.begin_sample(b);
    kernel.run(within * kBlock, end < p.n ? end : p.n);
    first += count;
  }
  fence_streams();
}

inline void step(const StepParams& p, int64_t first, int64_t last) {
  if (p.table_dtype == DType::f64)
    step_blocks<double>(p, first, last);
  else
    step_blocks<float>(p, first, last);
}

}  // namespace fastdiff::FASTDIFF_ISA
