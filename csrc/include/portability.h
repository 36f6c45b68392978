// Marks what host and device share. Contraction is off by flag everywhere (-ffp-contract=off,
// -fmad=false), so `a * b + c` in these headers is two roundings on every target.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__CUDACC__)
#define FD_UNROLL _Pragma("unroll")
#define FD_NO_UNROLL _Pragma("unroll 1")
#define FD_HD __host__ __device__ __forceinline__
#else
#define FD_UNROLL _Pragma("GCC unroll 16")
#define FD_NO_UNROLL _Pragma("GCC unroll 1")
#define FD_HD inline __attribute__((always_inline))
#endif

namespace fastdiff {

template <class To, class From>
FD_HD To bit_cast(From value) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast between types of one size");
  To result;
  memcpy(&result, &value, sizeof(To));
  return result;
}

}  // namespace fastdiff
