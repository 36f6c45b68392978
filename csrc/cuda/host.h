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

template <class Kernel, class... Args>
inline void fd_launch_on_host(Kernel kernel, dim3 grid, dim3 block, const Args&... args) {
  gridDim = grid;
  blockDim = block;
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z)
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x)
        for (threadIdx.y = 0; threadIdx.y < block.y; ++threadIdx.y)
          for (threadIdx.x = 0; threadIdx.x < block.x; ++threadIdx.x) kernel(args...);
}
