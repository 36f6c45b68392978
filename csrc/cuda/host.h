// Stand-ins for what nvcc knows, so that g++ compiles the kernels and the CPU runs them:
//     g++ -x c++ -DFASTDIFF_CUDA_HOST -include csrc/cuda/host.h csrc/cuda/step.cu
// A launch becomes a loop over blocks and threads; where threads wait for each other they are
// fibers that take turns. It checks indexing, arithmetic, aliasing and that all threads reach a
// barrier, not races.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static thread_local

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

// ---- threads that wait for each other

// The threads of one block. A fiber runs until it waits or ends; then the next one has its turn.
class FdBlock {
 public:
  template <class Run>
  void run(dim3 block, Run run_thread) {
    const unsigned count = block.x * block.y * block.z;
    fibers_.resize(count);
    warps_.assign(count / 32, {});
    together_ = {};
    for (auto& values : exchanged) values.assign(count, 0.0f);
    body_ = [](void* run) { (*static_cast<Run*>(run))(); };
    argument_ = &run_thread;
    for (Fiber& fiber : fibers_) start(fiber);
    for (unsigned left = count; left > 0;) {
      moved_ = false;
      for (current_ = 0; current_ < count; ++current_) {
        Fiber& fiber = fibers_[current_];
        if (fiber.ended) continue;
        threadIdx.x = current_ % block.x;
        threadIdx.y = current_ / block.x;
        swapcontext(&home_, &fiber.context);
        if (fiber.ended) {
          moved_ = true;
          --left;
        }
      }
      if (!moved_) {
        std::fprintf(stderr, "threads wait for one that does not come: %s\n", fd_launched);
        std::abort();
      }
    }
  }

  void wait_for_block() { wait(together_, static_cast<unsigned>(fibers_.size())); }
  void wait_for_warp() { wait(warps_[current_ / 32], 32); }
  unsigned current() const { return current_; }

  // 0 and 1 by turns, of the current thread.
  unsigned turn() { return fibers_[current_].turn ^= 1; }

  std::vector<float> exchanged[2];  // of each thread

 private:
  static constexpr size_t kStack = 256 * 1024;
  struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    bool ended = false;
    unsigned turn = 0;
  };
  struct Barrier {
    unsigned arrived = 0, generation = 0;
  };

  static FdBlock*& running() {
    static thread_local FdBlock* block = nullptr;
    return block;
  }
  static void enter() {
    FdBlock& block = *running();
    block.body_(block.argument_);
    block.fibers_[block.current_].ended = true;
  }
  void start(Fiber& fiber) {
    running() = this;
    if (!fiber.stack) fiber.stack.reset(new char[kStack]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = &home_;
    fiber.ended = false;
    fiber.turn = 0;
    makecontext(&fiber.context, &enter, 0);
  }
  void wait(Barrier& barrier, unsigned members) {
    const unsigned generation = barrier.generation;
    moved_ = true;
    if (++barrier.arrived == members) {
      barrier.arrived = 0;
      ++barrier.generation;
    }
    while (barrier.generation == generation) swapcontext(&fibers_[current_].context, &home_);
  }

  std::vector<Fiber> fibers_;
  std::vector<Barrier> warps_;
  Barrier together_;
  ucontext_t home_;
  unsigned current_ = 0;
  bool moved_ = false;
  void (*body_)(void*) = nullptr;
  void* argument_ = nullptr;
};
inline thread_local FdBlock fd_block;

inline void __syncthreads() { fd_block.wait_for_block(); }

// Values go through one of two places by turns: whoever writes to one has passed the wait after
// which the others read what was there before.
inline float __shfl_xor_sync(unsigned, float value, int distance) {
  const unsigned place = fd_block.turn();
  fd_block.exchanged[place][fd_block.current()] = value;
  fd_block.wait_for_warp();
  return fd_block.exchanged[place][fd_block.current() ^ static_cast<unsigned>(distance)];
}

// A launch of a kernel whose threads wait for each other.
template <auto kKernel, class... Args>
inline void fd_launch_fibers_on_host(dim3 grid, dim3 block, const Args&... args) {
  fd_launched = __PRETTY_FUNCTION__;
  gridDim = grid;
  blockDim = block;
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z)
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x)
        fd_block.run(block, [&] { kKernel(args...); });
}
