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

FD_HD void store_normals(bf16_t* z, Lanes::F (&normals)[4]) {
  Lanes::U rounded[4];
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) rounded[k] = round_number_to_bf16(Lanes::bits(normals[k]));
  Lanes::U z01 = join_halves(rounded[0], rounded[1]), z23 = join_halves(rounded[2], rounded[3]);
  Lanes::interleave_pairs(z01, z23);
  store_vector(z, z01);
  store_vector(z + 2 * Lanes::kCount, z23);
}

// kRun normals of the counters first_block..: emit(first, normals) gets them by the 4 kCount, as
// box_muller leaves them (element k of every counter in normals[k], counters in the order for S).
template <class S, class Emit>
FD_HD void each_quad(const Draw& draw, uint32_t first_block, const Emit& emit) {
  static constexpr CounterOffsets kOffsets = counter_offsets<S>();
  Lanes::W words[4] = {Lanes::word(first_block), Lanes::word(draw.key.sample),
                       Lanes::word(draw.step), Lanes::word(draw.stream)};
#pragma GCC unroll 4
  for (int i = 0; i < Lanes::kChains; ++i)
    words[0].chain[i] += load_vector<Lanes::Wide>(kOffsets.of[i]);
  philox4x32<Lanes>(words, draw.key.seed_low, draw.key.seed_high);
#pragma GCC unroll 2
  for (int half = 0; half < Lanes::kChains / 2; ++half) {
    Lanes::U merged[4];
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k)
      merged[k] = Lanes::merge(words[k].chain[2 * half], words[k].chain[2 * half + 1]);
    Lanes::F normals[4];
    box_muller<Lanes>(merged[0], merged[1], normals[0], normals[1]);
    box_muller<Lanes>(merged[2], merged[3], normals[2], normals[3]);
    emit(4 * half * Lanes::kCount, normals);
  }
}

// kRun normals rounded to S, in memory order.
template <class S>
FD_HD void normals_run(const Draw& draw, uint32_t first_block, S* z) {
  const auto emit = [z](int first, Lanes::F(&normals)[4]) { store_normals(z + first, normals); };
  each_quad<S>(draw, first_block, emit);
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

// At least `count` normals: whole runs.
template <class S, class A = NothingAhead>
__attribute__((noinline)) void fill_normals(const Draw draw, uint32_t first_block, S* z,
                                            int64_t count, const A& ahead = {}) {
  for (int64_t i = 0; i < count; i += kRun) {
    ahead.fetch(i, kRun);
    normals_run(draw, first_block + static_cast<uint32_t>(i / 4), z + i);
  }
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
  for (int64_t block = first; block < last; ++block) {
    const int64_t b = block / per_sample, begin = block % per_sample * kBlock;
    const int count = static_cast<int>(p.n - begin < kBlock ? p.n - begin : kBlock);
    const int whole = count / kRun * kRun;
    const Draw draw{noise_key(p.keys, p.seed, p.sample_offset, b), static_cast<uint32_t>(p.step),
                    static_cast<uint32_t>(p.stream)};
    const uint32_t counter = static_cast<uint32_t>(p.first_block + begin / 4);
    S* out = static_cast<S*>(p.out.data) + b * p.n + begin;
    fill_normals(draw, counter, out, whole);
    if (whole == count) continue;
    S tail[kRun];
    fill_normals(draw, counter + static_cast<uint32_t>(whole / 4), tail, kRun);
    memcpy(out + whole, tail, static_cast<size_t>(count - whole) * sizeof(S));
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
  }
}

}  // namespace fastdiff::FASTDIFF_ISA
