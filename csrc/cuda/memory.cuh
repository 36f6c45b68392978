// How a thread reads and writes its elements: chunks of kWidth elements of one sample, computed in
// float32 whatever is stored, with 128-bit accesses where the chunk is whole and aligned.
#pragma once

#include "../include/dtype.h"
#include "../include/params.h"

namespace fastdiff {

constexpr int kWarp = 32;
constexpr float kNegativeZero = -0.0f;  // the identity of addition: -0.0 + x is x for every x

// The same value, of which the compiler knows nothing. What is computed from it stays where it is
// used instead of moving out of a loop and into registers; and it is itself not computed again.
template <class T>
__device__ __forceinline__ T hidden(T value) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == 4) {
    asm volatile("" : "+r"(value));
  } else {
    asm volatile("" : "+l"(value));
  }
#endif
  return value;
}

// A value that all threads of a warp have, in a uniform register: there it takes none of each
// thread, and what is computed from it is computed once for the warp. All 32 threads must be here.
__device__ __forceinline__ uint32_t uniform(uint32_t value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  return __reduce_or_sync(0xffffffffu, value);
#else
  return value;
#endif
}
__device__ __forceinline__ float uniform(float value) {
  return bit_cast<float>(uniform(bit_cast<uint32_t>(value)));
}

// Where the elements of a thread lie, in Philox blocks of four neighbours. Side by side: 8 elements
// are 128 bits of a 16-bit type. Split (float32): the second four lie one warp-row further, so that
// each 128-bit instruction of a warp covers 512 contiguous bytes.
template <int kWidth_, bool kSplit_>
struct Layout {
  static constexpr int kWidth = kWidth_;
  static constexpr int kGroups = kWidth / 4;
  static constexpr int kStride = kSplit_ ? kWarp : 1;             // blocks from group to group
  static constexpr int kReach = (kGroups - 1) * kStride * 4 + 4;  // first to last element + 1

  static __device__ __forceinline__ uint32_t first(uint32_t thread) {
    if (!kSplit_) return thread * kGroups;
    return thread / kWarp * (kWarp * kGroups) + thread % kWarp;
  }
};

// The chunk that a thread works on: its first block, and how many elements exist from there on.
// Whole: they may be accessed 128 bits at a time.
struct Chunk {
  uint32_t block;
  int64_t left;
  bool whole;

  __device__ __forceinline__ int64_t first() const { return static_cast<int64_t>(block) * 4; }
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
  FD_UNROLL
  for (int k = 0; k < 4; k += 2) unpack<T>(pack<T>(v[k], v[k + 1]), v[k], v[k + 1]);
}
template <>
__device__ __forceinline__ void round_group<float>(float*) {}

__device__ __forceinline__ void round_group(DType dtype, float* v) {
  if (dtype == DType::bf16) round_group<bf16_t>(v);
  if (dtype == DType::f16) round_group<f16_t>(v);
}

// ---- whole groups, 128 or 64 bits an instruction

template <class L, class T>
__device__ __forceinline__ void load_whole(const T* p, float (&v)[L::kWidth]) {
  if constexpr (sizeof(T) == 2 && L::kReach == 8) {
    const uint4 words = *reinterpret_cast<const uint4*>(p);
    unpack<T>(words.x, v[0], v[1]);
    unpack<T>(words.y, v[2], v[3]);
    unpack<T>(words.z, v[4], v[5]);
    unpack<T>(words.w, v[6], v[7]);
    return;
  }
  FD_UNROLL
  for (int g = 0; g < L::kGroups; ++g) {
    if constexpr (sizeof(T) == 2) {
      const uint2 words = *reinterpret_cast<const uint2*>(p + 4 * g * L::kStride);
      unpack<T>(words.x, v[4 * g], v[4 * g + 1]);
      unpack<T>(words.y, v[4 * g + 2], v[4 * g + 3]);
    } else {
      const float4 four = *reinterpret_cast<const float4*>(p + 4 * g * L::kStride);
      v[4 * g] = four.x, v[4 * g + 1] = four.y, v[4 * g + 2] = four.z, v[4 * g + 3] = four.w;
    }
  }
}

template <class L, class T>
__device__ __forceinline__ void store_whole(T* p, const float (&v)[L::kWidth]) {
  if constexpr (sizeof(T) == 2 && L::kReach == 8) {
    *reinterpret_cast<uint4*>(p) =
        uint4{pack<T>(v[0], v[1]), pack<T>(v[2], v[3]), pack<T>(v[4], v[5]), pack<T>(v[6], v[7])};
    return;
  }
  FD_UNROLL
  for (int g = 0; g < L::kGroups; ++g) {
    if constexpr (sizeof(T) == 2) {
      *reinterpret_cast<uint2*>(p + 4 * g * L::kStride) =
          uint2{pack<T>(v[4 * g], v[4 * g + 1]), pack<T>(v[4 * g + 2], v[4 * g + 3])};
    } else {
      *reinterpret_cast<float4*>(p + 4 * g * L::kStride) =
          float4{v[4 * g], v[4 * g + 1], v[4 * g + 2], v[4 * g + 3]};
    }
  }
}

// ---- chunks. `base` is element 0 of the sample. Only neighbours can be fewer than a whole chunk.

template <class L, class T>
__device__ __forceinline__ void load(const T* base, const Chunk& chunk, float (&v)[L::kWidth]) {
  base += chunk.first();
  if (chunk.whole) {
    load_whole<L>(base, v);
    return;
  }
  if constexpr (L::kReach == L::kWidth) {
    FD_UNROLL
    for (int k = 0; k < L::kWidth; ++k) v[k] = k < chunk.left ? to_f32(base[k]) : 0.0f;
  }
}

template <class L, class T>
__device__ __forceinline__ void store(T* base, const Chunk& chunk, const float (&v)[L::kWidth]) {
  base += chunk.first();
  if (chunk.whole) {
    store_whole<L>(base, v);
    return;
  }
  if constexpr (L::kReach == L::kWidth) {
    FD_UNROLL
    for (int k = 0; k < L::kWidth; ++k) {
      if (k < chunk.left) narrow(v[k], base[k]);
    }
  }
}

// The same for an operand whose type is known at run time; `offset` is that of the sample.
template <class L>
__device__ __forceinline__ void load_operand(const Operand& operand, int64_t offset,
                                             const Chunk& chunk, float (&v)[L::kWidth]) {
  with_type(operand.dtype, [&](auto type) {
    load<L>(static_cast<const typename decltype(type)::Type*>(operand.data) + offset, chunk, v);
  });
}

template <class L>
__device__ __forceinline__ void store_operand(const Operand& operand, int64_t offset,
                                              const Chunk& chunk, const float (&v)[L::kWidth]) {
  with_type(operand.dtype, [&](auto type) {
    store<L>(static_cast<typename decltype(type)::Type*>(operand.data) + offset, chunk, v);
  });
}

}  // namespace fastdiff
