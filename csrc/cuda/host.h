// Stand-ins for what nvcc knows, so that g++ compiles kernels.cu and the CPU runs it:
//     g++ -x c++ -DFASTDIFF_CUDA_HOST -include csrc/cuda/host.h csrc/cuda/kernels.cu
// A launch becomes a loop over blocks and threads. Kernels with barriers or shared memory would
// not survive that; these have none. It checks indexing, arithmetic and aliasing, not races.
#pragma once

#include <cmath>
#include <cstdint>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
inline thread_local dim3 gridDim, blockDim, blockIdx, threadIdx;

// Aligned as on the device: an access that would fault there is undefined here, and the tests
// compile with -fsanitize=alignment.
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};

template <class T>
inline T __ldg(const T* pointer) {
  return *pointer;
}
inline float __fdiv_rn(float a, float b) { return a / b; }

#if defined(FASTDIFF_MODEL_FAST)
// The special function unit at its documented error: the exact result, moved by these shares (-1 to
// 1) of the most that the PTX ISA allows. Logarithm: 2^-22 within (0.5, 2), outside 2^-22 of the
// result, 0 at powers of two (not documented; `make gpu-check` compares on hardware). Root: 2^-23
// of the result. Sine, cosine: 2^-20.5.
struct ApproximationErrors {
  double log2, sqrt, sin, cos;
};
inline thread_local ApproximationErrors fd_errors = {0, 0, 0, 0};

inline float approximate_log2(float x) {
  int exponent;
  if (std::frexp(x, &exponent) == 0.5f) return static_cast<float>(exponent - 1);
  const double exact = std::log2(static_cast<double>(x));
  const double most = x > 0.5f && x < 2.0f ? 0x1p-22 : 0x1p-22 * std::fabs(exact);
  return static_cast<float>(exact + fd_errors.log2 * most);
}
inline float approximate_sqrt(float x) {
  return static_cast<float>(std::sqrt(static_cast<double>(x)) * (1 + fd_errors.sqrt * 0x1p-23));
}
inline float approximate_sin(float x) {
  return static_cast<float>(std::sin(static_cast<double>(x)) + fd_errors.sin * std::exp2(-20.5));
}
inline float approximate_cos(float x) {
  return static_cast<float>(std::cos(static_cast<double>(x)) + fd_errors.cos * std::exp2(-20.5));
}
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
#endif

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorNotSupported = 801;
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMultiProcessorCount
};
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
// Capability 0 is no row of the policy table; two multiprocessors make grids small enough that
// threads take several tiles.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? 2 : 0;
  return cudaSuccess;
}

// What this thread launched last, in a compiler's words: "... [with auto kKernel = <the kernel>;
// ...".
inline thread_local const char* fd_launched = "";
extern "C" __attribute__((visibility("default"), used)) inline const char* fd_last_kernel() {
  return fd_launched;
}

template <auto kKernel, class... Args>
inline void fd_launch_on_host(dim3 grid, dim3 block, const Args&... args) {
  fd_launched = __PRETTY_FUNCTION__;
  gridDim = grid;
  blockDim = block;
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z)
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x)
        for (threadIdx.y = 0; threadIdx.y < block.y; ++threadIdx.y)
          for (threadIdx.x = 0; threadIdx.x < block.x; ++threadIdx.x) kKernel(args...);
}
