// Element types: codes shared with fastdiff/ops/schemas.py (DTYPE_CODES) and their conversions.
// Every conversion to a narrower type rounds once, to nearest even, denormals included.
#pragma once

#include "portability.h"

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#endif

namespace fastdiff {

// u8: bits alone (fastdiff/ops/bits.py) are stored so.
enum class DType : int32_t { f32 = 0, bf16 = 1, f16 = 2, f64 = 3, u8 = 4 };

// Storage types: distinct, so that templates can tell them from integers.
struct bf16_t {
  uint16_t bits;
};
struct f16_t {
  uint16_t bits;
};

FD_HD float to_f32(float value) { return value; }
FD_HD float to_f32(double value) { return static_cast<float>(value); }
FD_HD float to_f32(bf16_t value) {
  return bit_cast<float>(static_cast<uint32_t>(value.bits) << 16);
}

FD_HD bf16_t to_bf16(float value) {
  const uint32_t u = bit_cast<uint32_t>(value);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {0x7fc0};
  return {static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}

#if defined(__CUDA_ARCH__)
FD_HD float to_f32(f16_t value) { return __half2float(__ushort_as_half(value.bits)); }
FD_HD f16_t to_f16(float value) { return {__half_as_ushort(__float2half_rn(value))}; }
#else
FD_HD float to_f32(f16_t value) {
  const uint32_t magnitude = value.bits & 0x7fffu, sign = (value.bits & 0x8000u) << 16;
  // Shifted into float32's fields the exponent is 112 too small; one multiply by 2^112 mends
  // normals and denormals alike, exactly. Infinity and NaN keep their own exponent.
  if (magnitude >= 0x7c00u) return bit_cast<float>(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  return bit_cast<float>(sign | bit_cast<uint32_t>(bit_cast<float>(magnitude << 13) * 0x1p112f));
}

FD_HD f16_t to_f16(float value) {
  const uint32_t u = bit_cast<uint32_t>(value);
  const uint32_t sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // >= 65520
  if (magnitude < 0x38800000u) {
    // Below 2^-14: adding 0.5 puts the unit of the half's denormals at the last float bit, so the
    // addition itself rounds to nearest even.
    const uint32_t sum = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f);
    return {static_cast<uint16_t>(sign | (sum - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return {static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
}
#endif

// A normal rounded to the dtype of the noise and widened again, as if it had been stored.
FD_HD float round_to(DType dtype, float value) {
  switch (dtype) {
    case DType::bf16:
      return to_f32(to_bf16(value));
    case DType::f16:
      return to_f32(to_f16(value));
    default:
      return value;
  }
}

}  // namespace fastdiff
