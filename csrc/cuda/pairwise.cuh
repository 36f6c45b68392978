// Sums by the fixed tree of fastdiff/ops/loss.py (neighbours 2k and 2k + 1, then neighbouring
// sums): of the elements of a thread, of a warp, and of a block that works on one piece of a
// sample. What is not there counts as -0, the identity of addition.
#pragma once

#include "launch.cuh"

namespace fastdiff {

// Neighbours, then neighbouring sums, and so on; kCount is a power of two.
template <int kCount>
__device__ __forceinline__ float pairwise_sum(const float* v) {
  if constexpr (kCount == 1) {
    return v[0];
  } else {
    return pairwise_sum<kCount / 2>(v) + pairwise_sum<kCount / 2>(v + kCount / 2);
  }
}

__device__ __forceinline__ float from_lane(float value, int distance) {
  return __shfl_xor_sync(0xffffffffu, value, distance);
}

// The sum of the chunks of all lanes, in every lane. Split chunks are two rows of the warp: the
// sums of the first go to even lanes and those of the second to odd ones, so that both rows are
// added up at once, and the two totals are neighbours in the end.
template <class L>
__device__ __forceinline__ float warp_sum(const float (&v)[L::kWidth]) {
  float sum;
  if constexpr (L::kStride == 1) {
    sum = pairwise_sum<L::kWidth>(v);
    sum = sum + from_lane(sum, 1);
  } else {
    static_assert(L::kGroups == 2, "two rows");
    const float first = pairwise_sum<4>(v), second = pairwise_sum<4>(v + 4);
    const bool odd = threadIdx.x % 2 != 0;
    sum = (odd ? second : first) + from_lane(odd ? first : second, 1);
  }
  FD_UNROLL
  for (int distance = 2; distance < kWarp; distance *= 2) sum = sum + from_lane(sum, distance);
  return L::kStride == 1 ? sum : sum + from_lane(sum, 1);
}

// Whether the tree over `count` elements adds nothing that is not there to what is.
__device__ __forceinline__ bool is_full(int64_t count) {
  return count > 0 && (count & (count - 1)) == 0;
}

// Sums of kTerms sequences, each over the threads of a block in their order: every warp put()s its
// sums; after a __syncthreads() total() has them.
template <int kTerms>
struct BlockSums {
  static constexpr int kMost = kThreads / kWarp;  // warps
  float of_warp[kTerms][kMost];

  __device__ __forceinline__ void put(int term, float sum) {
    if (threadIdx.x % kWarp == 0) of_warp[term][threadIdx.x / kWarp] = sum;
  }

  // Of a piece of `count` elements; only: it is all there is.
  __device__ __forceinline__ float total(int term, int64_t count, bool only) const {
    float v[kMost];
    FD_UNROLL
    for (int w = 0; w < kMost; ++w) {
      v[w] = w * kWarp < static_cast<int>(blockDim.x) ? of_warp[term][w] : kNegativeZero;
    }
    const float sum = pairwise_sum<kMost>(v);
    return count >= kPiece || (only && is_full(count)) ? sum : sum + 0.0f;
  }
};

}  // namespace fastdiff
