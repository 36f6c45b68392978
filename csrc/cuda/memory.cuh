// How a thread reads and writes its elements: chunks of kWidth elements of one sample, computed in
// float32 whatever is stored, with 128-bit accesses where the chunk is whole and aligned.
#pragma once

#include "../include/dtype.h"
#include "../include/params.h"

namespace fastdiff {

constexpr int kWarp = 32;
constexpr float kNegativeZero = -0.0f;  // the identity of addition: -0.0 + x is x for every x

// Where the elements of a thread lie. Contiguous: kWidth neighbours, 128 bits of a 16-bit type.
// Split (float32 only): groups of four neighbours one warp-row apart, so that each 128-bit
// instruction of a warp covers 512 contiguous bytes. Both tile the same kWarp * kWidth elements,
// and both start at a multiple of four: a group is one Philox block.
template <int kWidth_, bool kSplit_>
struct Layout {
  static constexpr int kWidth = kWidth_;
  static constexpr int kGroups = kWidth / 4;
  static constexpr int kGroupStride = kSplit_ ? 4 * kWarp : 4;
  static constexpr int kReach = (kGroups - 1) * kGroupStride + 4;  // first to last element + 1

  static __device__ __forceinline__ int first(int thread) {
    if (!kSplit_) return thread * kWidth;
    return thread / kWarp * (kWarp * kWidth) + thread % kWarp * 4;
  }
};

// The chunk that a thread works on: element `first` of its sample, and whether all of it exists
// and may be accessed 128 bits at a time.
struct Chunk {
  int64_t first, n;
  bool whole;
};

template <class T>
struct Identity {
  using Type = T;
};

// Calls action(Identity<T>) with the storage type of a run-time dtype: a uniform branch.
template <class Action>
__device__ __forceinline__ void with_type(DType dtype, Action action) {
  if (dtype == DType::f32) {
    action(Identity<float>());
  } else if (dtype == DType::bf16) {
    action(Identity<bf16_t>());
  } else {
    action(Identity<f16_t>());
  }
}

// ---- two 16-bit elements in a word

template <class T>
__device__ __forceinline__ void unpack(uint32_t word, float& low, float& high) {
  low = to_f32(T{static_cast<uint16_t>(word)});
  high = to_f32(T{static_cast<uint16_t>(word >> 16)});
}
template <>
__device__ __forceinline__ void unpack<bf16_t>(uint32_t word, float& low, float& high) {
  low = bit_cast<float>(word << 16);
  high = bit_cast<float>(word & 0xffff0000u);
}

__device__ __forceinline__ void narrow(float value, float& result) { result = value; }
__device__ __forceinline__ void narrow(float value, bf16_t& result) { result = to_bf16(value); }
__device__ __forceinline__ void narrow(float value, f16_t& result) { result = to_f16(value); }

// Both round to nearest even; the hardware instruction (sm_80) differs from to_bf16 only in the
// payload of a NaN.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  T a, b;
  narrow(low, a);
  narrow(high, b);
  return a.bits | static_cast<uint32_t>(b.bits) << 16;
}
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
template <>
__device__ __forceinline__ uint32_t pack<bf16_t>(float low, float high) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
template <>
__device__ __forceinline__ uint32_t pack<f16_t>(float low, float high) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
#endif

// Four values as if stored in T and read back.
template <class T>
__device__ __forceinline__ void round_group(float* v) {
  if (sizeof(T) == 4) return;
  FD_UNROLL
  for (int k = 0; k < 4; k += 2) unpack<T>(pack<T>(v[k], v[k + 1]), v[k], v[k + 1]);
}
template <>
__device__ __forceinline__ void round_group<float>(float*) {}

// ---- whole groups, 128 or 64 bits an instruction

template <class L>
__device__ __forceinline__ void load_whole(const float* p, float (&v)[L::kWidth]) {
  FD_UNROLL
  for (int g = 0; g < L::kGroups; ++g) {
    const float4 four = *reinterpret_cast<const float4*>(p + g * L::kGroupStride);
    v[4 * g] = four.x, v[4 * g + 1] = four.y, v[4 * g + 2] = four.z, v[4 * g + 3] = four.w;
  }
}

template <class L, class T>
__device__ __forceinline__ void load_whole(const T* p, float (&v)[L::kWidth]) {
  if constexpr (L::kReach == 8) {
    const uint4 words = *reinterpret_cast<const uint4*>(p);
    unpack<T>(words.x, v[0], v[1]);
    unpack<T>(words.y, v[2], v[3]);
    unpack<T>(words.z, v[4], v[5]);
    unpack<T>(words.w, v[6], v[7]);
  } else {
    FD_UNROLL
    for (int g = 0; g < L::kGroups; ++g) {
      const uint2 words = *reinterpret_cast<const uint2*>(p + g * L::kGroupStride);
      unpack<T>(words.x, v[4 * g], v[4 * g + 1]);
      unpack<T>(words.y, v[4 * g + 2], v[4 * g + 3]);
    }
  }
}

template <class L>
__device__ __forceinline__ void store_whole(float* p, const float (&v)[L::kWidth]) {
  FD_UNROLL
  for (int g = 0; g < L::kGroups; ++g) {
    *reinterpret_cast<float4*>(p + g * L::kGroupStride) =
        float4{v[4 * g], v[4 * g + 1], v[4 * g + 2], v[4 * g + 3]};
  }
}

template <class L, class T>
__device__ __forceinline__ void store_whole(T* p, const float (&v)[L::kWidth]) {
  if constexpr (L::kReach == 8) {
    *reinterpret_cast<uint4*>(p) = uint4{pack<T>(v[0], v[1]), pack<T>(v[2], v[3]),
                                         pack<T>(v[4], v[5]), pack<T>(v[6], v[7])};
  } else {
    FD_UNROLL
    for (int g = 0; g < L::kGroups; ++g) {
      *reinterpret_cast<uint2*>(p + g * L::kGroupStride) =
          uint2{pack<T>(v[4 * g], v[4 * g + 1]), pack<T>(v[4 * g + 2], v[4 * g + 3])};
    }
  }
}

// ---- chunks. `base` is element 0 of the sample.

template <class L, class T>
__device__ __forceinline__ void load(const T* base, const Chunk& chunk, float (&v)[L::kWidth]) {
  if (chunk.whole) {
    load_whole<L>(base + chunk.first, v);
    return;
  }
  FD_UNROLL
  for (int k = 0; k < L::kWidth; ++k) {
    const int64_t element = chunk.first + k / 4 * L::kGroupStride + k % 4;
    v[k] = element < chunk.n ? to_f32(base[element]) : 0.0f;
  }
}

template <class L, class T>
__device__ __forceinline__ void store(T* base, const Chunk& chunk, const float (&v)[L::kWidth]) {
  if (chunk.whole) {
    store_whole<L>(base + chunk.first, v);
    return;
  }
  FD_UNROLL
  for (int k = 0; k < L::kWidth; ++k) {
    const int64_t element = chunk.first + k / 4 * L::kGroupStride + k % 4;
    if (element < chunk.n) narrow(v[k], base[element]);
  }
}

}  // namespace fastdiff
