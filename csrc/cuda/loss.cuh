// Losses (fastdiff/ops/loss.py) on the GPU. A block takes pieces of kPiece elements of one sample
// and leaves the sum of each; further launches add up kPiece such sums at a time until one is left.
// A sample of one piece needs no more than the first.
#pragma once

#include "loss_chunk.cuh"
#include "pairwise.cuh"

namespace fastdiff {

// Threads of a block: a piece, all of its chunks at once.
template <class S>
constexpr int kPieceThreads = kPiece / S::L::kWidth;

// What becomes of the sum of term number `term` over a sample.
__device__ __forceinline__ float loss_result(const LossRow& row, int term, float sum) {
  if (term == 2) return sum * row[kXStartScale];
  const int scale = term == 0 ? kErrorScale : kBoundScale;
  return sum * row[scale] + row[scale + 1];
}

// Which of a loss's results belongs to a term.
__device__ __forceinline__ int result_of(int terms, int term) {
  const int before = terms & ((1 << term) - 1);
  return (before & 1) + (before >> 1);
}

// The sums of one chunk's terms over the warp, to `sums`.
template <class S>
__device__ __forceinline__ void loss_chunk(const LossParams& p, const LossFacts& f,
                                           const LossSample& sample, uint32_t b, const Chunk& chunk,
                                           BlockSums<3>& sums) {
  using L = typename S::L;
  using Columns = LossColumns<S>;
  const bool bound = f.terms & kBoundTerm;
  const LossUse use = LossUse::of(f, f.terms & kErrorTerm, bound, f.terms & kXStartTerm,
                                  bound && f.learned, sample.bound.discretized);
  Columns columns{p, f, sample, {}, {}, {}, {}, {}, {}};
  if (chunk.left > 0) columns.read(use, b, chunk, p.made.dtype, true);
  typename Columns::Values value;
  const auto sum = [&](int term) {
    if (!chunk.whole) {
      FD_UNROLL
      for (int k = 0; k < L::kWidth; ++k) {
        const int place = (k / 4) * 4 * L::kStride + k % 4;
        value[k] = place < chunk.left ? value[k] : kNegativeZero;
      }
    }
    sums.put(term, warp_sum<L>(value));
  };
  if (use.e) {
    columns.error(value);
    with_rho(f.rho, [&](auto rho) {
      FD_UNROLL
      for (int k = 0; k < L::kWidth; ++k) {
        value[k] = rho_value<Scalar, decltype(rho)::value>(value[k], sample[kDelta]);
      }
    });
    sum(0);
  }
  if (use.d) {
    columns.deviation(value);
    with_bound(f, sample, [&](auto kind, auto learned) {
      constexpr BoundKind kKind = decltype(kind)::value;
      constexpr bool kLearned = decltype(learned)::value;
      each_bound<kKind>(columns.x, value, columns.v, [&](float x, float& d, float v) {
        d = bound_value<Scalar, kKind, kLearned>(sample.bound, x, d, v);
      });
    });
    sum(1);
  }
  if (use.x_start) {
    FD_UNROLL
    for (int k = 0; k < L::kWidth; ++k) {
      const float difference = columns.x[k] - columns.c(k);
      value[k] = difference * difference;
    }
    sum(2);
  }
}

template <class S>
__global__ void __launch_bounds__(kPieceThreads<S>, S::kResident* kThreads / kPieceThreads<S>)
    loss_kernel(const __grid_constant__ LossParams p, bool aligned) {
  using L = typename S::L;
  __shared__ BlockSums<3> sums[2];  // of pieces by turns: one barrier a piece is enough
  const uint32_t b = sample_index();
  if (b >= p.batch) return;
  const LossFacts f = S::facts(p);
  const LossRow row = LossRow::of(p, b);
  const LossSample sample(p, f, row, b);
  const uint32_t pieces = static_cast<uint32_t>(p.pieces);
  uint32_t turn = 0;
  for (uint32_t piece = blockIdx.x; piece < pieces; piece += gridDim.x, turn ^= 1) {
    const uint32_t block = piece * (kPiece / 4) + L::first(threadIdx.x);
    const int64_t left = p.n - static_cast<int64_t>(block) * 4;
    loss_chunk<S>(p, f, sample, b, {block, left, aligned && left >= L::kReach}, sums[turn]);
    __syncthreads();
    const int term = static_cast<int>(threadIdx.x);
    if (term < 3 && f.terms >> term & 1) {
      const int64_t count = p.n - static_cast<int64_t>(piece) * kPiece;
      const float total = sums[turn].total(term, count, pieces == 1);
      const int64_t entry = result_of(f.terms, term) * p.batch + b;
      if (pieces == 1) {
        static_cast<float*>(p.results)[entry] = loss_result(row, term, total);
      } else {
        static_cast<float*>(p.partials)[entry * p.pieces + piece] = total;
      }
    }
  }
}

// Adds up `count` sums of each term and sample, of which entry i is at i * stride, kPiece at a
// time; each total goes to the place of the first it is made of, which nobody else reads. The last
// launch leaves results.
__global__ void __launch_bounds__(kThreads, kResidentBlocksGeneral)
    loss_sum_kernel(const __grid_constant__ LossParams p, int64_t count, int64_t stride) {
  using L = Layout<4, false>;
  __shared__ BlockSums<1> sums[2];
  const uint32_t index = sample_index();  // of a sample of a result
  const int results = result_of(p.terms, 3);
  if (index >= results * p.batch) return;
  const uint32_t result = index / static_cast<uint32_t>(p.batch);
  float* const partials = static_cast<float*>(p.partials) + index * p.pieces;
  const uint32_t pieces = static_cast<uint32_t>((count - 1) / kPiece + 1);
  uint32_t turn = 0;
  for (uint32_t piece = blockIdx.x; piece < pieces; piece += gridDim.x, turn ^= 1) {
    const int64_t first = static_cast<int64_t>(piece) * kPiece;
    float v[L::kWidth];
    FD_UNROLL
    for (int k = 0; k < L::kWidth; ++k) {
      const int64_t i = first + L::kWidth * threadIdx.x + k;
      v[k] = i < count ? partials[i * stride] : kNegativeZero;
    }
    sums[turn].put(0, warp_sum<L>(v));
    __syncthreads();
    if (threadIdx.x == 0) {
      const float total = sums[turn].total(0, count - first, pieces == 1);
      if (pieces == 1) {
        int term = 0;
        while (!(p.terms >> term & 1) || result_of(p.terms, term) != static_cast<int>(result)) {
          ++term;
        }
        const uint32_t b = index - result * static_cast<uint32_t>(p.batch);
        static_cast<float*>(p.results)[index] = loss_result(LossRow::of(p, b), term, total);
      } else {
        partials[first * stride] = total;
      }
    }
  }
}

}  // namespace fastdiff
