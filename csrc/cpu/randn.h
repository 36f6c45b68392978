// Normals by the run: Lanes::kCounters counters of Philox, four normals each, in memory order.
#pragma once

#include "kernels.h"
#include "load_store.h"

namespace fastdiff::FASTDIFF_ISA {

// One draw of one sample; its elements are numbered by the block counter alone.
struct Draw {
  NoiseKey key;
  uint32_t step, stream;
};

constexpr int kRun = 4 * Lanes::kCounters;
static_assert(kBlock % kRun == 0, "a block is whole runs");

struct CounterOffsets {
  uint64_t of[Lanes::kChains][Lanes::kCount / 2];
};

// Chains 2h and 2h + 1 hold the counters of the even and odd lanes of merged register h.
template <class S>
constexpr CounterOffsets counter_offsets() {
  CounterOffsets offsets{};
  for (int chain = 0; chain < Lanes::kChains; ++chain) {
    for (int i = 0; i < Lanes::kCount / 2; ++i) {
      const int lane = 2 * i + chain % 2;
      const int counter =
          std::is_same_v<S, bf16_t> ? Lanes::counter_of_pairs(lane) : Lanes::counter_of(lane);
      offsets.of[chain][i] = chain / 2 * Lanes::kCount + counter;
    }
  }
  return offsets;
}

// The normals of Lanes::kCount counters, element k of each in normals[k], to memory order.
template <class S>
FD_HD void store_normals(S* z, Lanes::F (&normals)[4]) {
  Lanes::interleave(normals);
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) store<Lanes::kCount>(z + k * Lanes::kCount, normals[k]);
}

#if defined(FD_AVX512_BF16)
// Element k of lane j is at 16 k + j; half h holds the elements of counters 8 h to 8 h + 7.
constexpr Indices memory_order(int half) {
  Indices indices{};
  for (int lane = 0; lane < 16; ++lane) {
    const int counter = Lanes::counter_of_pairs(lane) - 8 * half;
    for (int k = 0; k < 4; ++k)
      if (counter >= 0 && counter < 8)
        indices.of[4 * counter + k] = static_cast<uint16_t>(16 * k + lane);
  }
  return indices;
}
#endif

// A normal is not NaN, nor denormal, which pack_bf16() would take for zero: |sin|, |cos| and
// sqrt(-2 ln u) are zero or at least 2^-30, 2^-1 and 2^-12.
FD_HD void store_normals(bf16_t* z, Lanes::F (&normals)[4]) {
#if defined(FD_AVX512_BF16)
  static constexpr Indices kFirst = memory_order(0), kSecond = memory_order(1);
  const Packed z01 = pack_bf16(normals[0], normals[1]), z23 = pack_bf16(normals[2], normals[3]);
  store_vector(z, permute(kFirst, z01, z23));
  store_vector(z + 32, permute(kSecond, z01, z23));
#else
  Lanes::U rounded[4];
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) rounded[k] = round_number_to_bf16(Lanes::bits(normals[k]));
  Lanes::U z01 = join_halves(rounded[0], rounded[1]), z23 = join_halves(rounded[2], rounded[3]);
  Lanes::interleave_pairs(z01, z23);
  store_vector(z, z01);
  store_vector(z + 2 * Lanes::kCount, z23);
#endif
}

// The Philox words of kRun normals: word k of the counters of half h.
struct Words {
  Lanes::U of[Lanes::kChains / 2][4];
};

template <class S>
FD_HD Words words_of(const Draw& draw, uint32_t first_block) {
  static constexpr CounterOffsets kOffsets = counter_offsets<S>();
  Lanes::W words[4] = {Lanes::word(first_block), Lanes::word(draw.key.sample),
                       Lanes::word(draw.step), Lanes::word(draw.stream)};
#pragma GCC unroll 4
  for (int i = 0; i < Lanes::kChains; ++i)
    words[0].chain[i] += load_vector<Lanes::Wide>(kOffsets.of[i]);
  philox4x32<Lanes>(words, draw.key.seed_low, draw.key.seed_high);
  Words result;
#pragma GCC unroll 2
  for (int half = 0; half < Lanes::kChains / 2; ++half)
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k)
      result.of[half][k] = Lanes::merge(words[k].chain[2 * half], words[k].chain[2 * half + 1]);
  return result;
}

// The normals of one run: emit(first, normals) gets them by the 4 kCount, as box_muller leaves them
// (element k of every counter in normals[k], counters in the order for S).
template <class Emit>
FD_HD void each_quad(const Words& words, int64_t run, const Emit& emit) {
#pragma GCC unroll 2
  for (int half = 0; half < Lanes::kChains / 2; ++half) {
    const Lanes::U(&word)[4] = words.of[half];
    Lanes::F normals[4];
    box_muller<Lanes>(word[0], word[1], normals[0], normals[1]);
    box_muller<Lanes>(word[2], word[3], normals[2], normals[3]);
    emit(run + 4 * half * Lanes::kCount, normals);
  }
}

// What a block reads and writes once its noise is made. It is fetched while the noise is being
// made, which keeps the arithmetic units busy and the memory system idle otherwise.
class Ahead {
 public:
  void add(const char* data, int64_t element_size) { streams_[count_++] = {data, element_size}; }
  FD_HD void fetch(int64_t first, int64_t elements) const {
    for (int k = 0; k < count_; ++k) {
      const char* line = streams_[k].data + first * streams_[k].element_size;
      const char* end = line + elements * streams_[k].element_size;
      for (; line < end; line += 64) __builtin_prefetch(line);
    }
  }

 private:
  struct Stream {
    const char* data;
    int64_t element_size;
  };
  int count_ = 0;
  Stream streams_[kMaxStates + 3 + kMaxDraws + kMaxOutputs + 2];
};

struct NothingAhead {
  FD_HD void fetch(int64_t, int64_t) const {}
};

// `count` > 0 normals, in whole runs, of the counters from first_block on. Both Philox and
// Box-Muller are long chains of dependent instructions, so the words of the next run are made
// beside the normals of this one.
template <class S, class Emit, class A = NothingAhead>
FD_HD void each_run(const Draw& draw, uint32_t first_block, int64_t count, const Emit& emit,
                    const A& ahead = {}) {
  Words words = words_of<S>(draw, first_block);
  int64_t run = 0;
  for (; run + kRun < count; run += kRun) {
    ahead.fetch(run, kRun);
    first_block += Lanes::kCounters;
    const Words next = words_of<S>(draw, first_block);
    each_quad(words, run, emit);
    words = next;
  }
  ahead.fetch(run, kRun);
  each_quad(words, run, emit);
}

// At least `count` normals: whole runs.
template <class S, class A = NothingAhead>
__attribute__((noinline)) void fill_normals(const Draw draw, uint32_t first_block, S* z,
                                            int64_t count, const A& ahead = {}) {
  const auto emit = [z](int64_t i, Lanes::F(&normals)[4]) { store_normals(z + i, normals); };
  each_run<S>(draw, first_block, count, emit, ahead);
}

// The noise of a fused operation, in memory of kBlock floats. float64 noise is the float32 normal
// widened, so it is left as float32: noise_storage() is how it lies there.
inline DType noise_storage(DType dtype) { return dtype == DType::f64 ? DType::f32 : dtype; }

template <class A = NothingAhead>
void fill_noise(DType dtype, const Draw& draw, uint32_t first_block, void* z, int64_t count,
                const A& ahead = {}) {
  if (dtype == DType::bf16)
    fill_normals(draw, first_block, static_cast<bf16_t*>(z), count, ahead);
  else if (dtype == DType::f16)
    fill_normals(draw, first_block, static_cast<f16_t*>(z), count, ahead);
  else
    fill_normals(draw, first_block, static_cast<float*>(z), count, ahead);
}

template <class S>
void randn_blocks(const RandnParams& p, int64_t first, int64_t last) {
  const int64_t per_sample = blocks_per_sample(p.n);
  while (first < last) {
    const int64_t b = first / per_sample, within = first % per_sample;
    const int64_t blocks = per_sample - within < last - first ? per_sample - within : last - first;
    const int64_t begin = within * kBlock, end = begin + blocks * kBlock;
    const int64_t count = (end < p.n ? end : p.n) - begin, whole = count / kRun * kRun;
    const Draw draw{noise_key(p.keys, p.seed, p.sample_offset, b), static_cast<uint32_t>(p.step),
                    static_cast<uint32_t>(p.stream)};
    const uint32_t counter = static_cast<uint32_t>(p.first_block + begin / 4);
    S* out = static_cast<S*>(p.out.data) + b * p.n + begin;
    if (whole > 0) fill_normals(draw, counter, out, whole);
    if (whole < count) {
      S tail[kRun];
      fill_normals(draw, counter + static_cast<uint32_t>(whole / 4), tail, kRun);
      memcpy(out + whole, tail, static_cast<size_t>(count - whole) * sizeof(S));
    }
    first += blocks;
  }
}

inline void randn(const RandnParams& p, int64_t first, int64_t last) {
  switch (p.out.dtype) {
    case DType::f32:
      return randn_blocks<float>(p, first, last);
    case DType::bf16:
      return randn_blocks<bf16_t>(p, first, last);
    case DType::f16:
      return randn_blocks<f16_t>(p, first, last);
    case DType::f64:
      return randn_blocks<double>(p, first, last);
    case DType::u8:  // of bits alone
      return;
  }
}

}  // namespace fastdiff::FASTDIFF_ISA
