// How kernels are launched: what is known of each GPU, the grid, and the launch itself.
#pragma once

#include "memory.cuh"

namespace fastdiff {

constexpr int kThreads = 256;  // a block, everywhere: 8 warps divide every occupancy below evenly

// What is known of a GPU, by compute capability.
struct Policy {
  int capability;
  int resident_blocks;   // of kThreads, an SM: its thread limit, which also bounds the registers
  int tiles_per_thread;  // chunks a thread works through once the GPU is full
};

// resident_blocks is threads per SM / kThreads; 65536 registers / (kThreads * resident_blocks) is
// the register bound that __launch_bounds__ then gives the compiler. Tiles: the work before the
// first load (row, coefficients, keys: about 50 instructions) is paid once per thread.
constexpr Policy kPolicies[] = {
    {75, 4, 4},   // 1024 threads: up to 64 registers
    {80, 8, 4},   // 2048 threads: 32 registers
    {86, 6, 4},   // 1536 threads: 40 registers
    {87, 6, 4},   // as 86
    {89, 6, 4},   // as 86; memory is so far behind arithmetic that nothing else matters
    {90, 8, 4},   // 2048 threads: 32 registers
    {100, 8, 4},  // 2048 threads: 32 registers
    {103, 8, 4},  // as 100
    {110, 6, 4},  // 1536 threads: 40 registers
    {120, 6, 4},  // 1536 threads: 40 registers
    {121, 6, 4},  // as 120
};
constexpr Policy kUnknown = {0, 6, 4};  // 40 registers fit the thread limit of every GPU so far

constexpr Policy policy_of(int capability) {
  for (const Policy& row : kPolicies) {
    if (row.capability == capability) return row;
  }
  return kUnknown;
}

#if defined(__CUDA_ARCH__)
constexpr int kResidentBlocks = policy_of(__CUDA_ARCH__ / 10).resident_blocks;
#else
constexpr int kResidentBlocks = kUnknown.resident_blocks;
#endif
// Steps of any structure keep more sums at once: 64 registers, and each thread has more in flight.
constexpr int kResidentBlocksGeneral = 4;

// ---- the index space: x runs over the elements of a sample, y and z over samples; a warp never
// holds two samples, so everything that is per sample is uniform in it.

__device__ __forceinline__ uint32_t sample_index() {
  return (blockIdx.z * gridDim.y + blockIdx.y) * blockDim.y + threadIdx.y;
}

// Calls action(block, last) for the first Philox block of every chunk of this thread. Blocks are
// counted in 32 bits: a sample's 2^34 elements are 2^32 of them.
template <class L, class Action>
__device__ __forceinline__ void for_each_block(int64_t n, Action action) {
  const uint32_t last = static_cast<uint32_t>((n - 1) / 4);
  const uint32_t stride = gridDim.x * (blockDim.x * L::kGroups);
  uint32_t block = blockIdx.x * (blockDim.x * L::kGroups) + L::first(threadIdx.x);
  while (block <= last) {
    action(block, last);
    const uint32_t next = block + stride;
    if (next < block) return;
    block = next;
  }
}

// Calls action(layout, chunk) for every chunk of this thread in a sample of n elements: L where the
// chunk is whole and aligned, else a group of four at a time, which keeps the code for ends, odd
// sizes and misaligned memory small.
template <class L, class Action>
__device__ __forceinline__ void for_each_chunk(int64_t n, bool aligned, Action action) {
  for_each_block<L>(n, [&](uint32_t block, uint32_t) {
    const int64_t left = n - static_cast<int64_t>(block) * 4;
    if (aligned && left >= L::kReach) {
      action(L(), Chunk{block, left, true});
      return;
    }
    FD_NO_UNROLL
    for (int g = 0; g < L::kGroups; ++g) {
      const int64_t rest = left - 4 * g * L::kStride;
      if (rest <= 0) return;
      action(Layout<4, false>(), Chunk{block + g * L::kStride, rest, aligned && rest >= 4});
    }
  });
}

constexpr int64_t kMaxRows = 65535;  // of blocks, in y and in z

struct Grid {
  dim3 blocks, threads;
};

// Policy and SM count of the current device, asked for once per thread and device.
inline const Policy& current_policy(int& multiprocessors) {
  static thread_local int known = -1, count = 1;
  static thread_local Policy policy = kUnknown;
  int device = 0;
  if (cudaGetDevice(&device) == cudaSuccess && device != known) {
    int major = 0, minor = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    policy = policy_of(10 * major + minor);
    known = device;
  }
  multiprocessors = count;
  return policy;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Small samples share a block (its y); large ones are cut into tiles, several to a thread when
// there are more than the GPU holds at once.
inline Grid make_grid(int64_t batch, int64_t n, int width) {
  int multiprocessors = 1;
  const Policy& policy = current_policy(multiprocessors);
  int across = kWarp;
  while (across < kThreads && static_cast<int64_t>(across) * width < n) across *= 2;
  const int samples = kThreads / across;
  const int64_t tiles = ceil_div(n, static_cast<int64_t>(across) * width);
  const int64_t rows = ceil_div(batch, samples);
  const int64_t resident = static_cast<int64_t>(multiprocessors) * policy.resident_blocks;
  const int64_t rows_y = rows < kMaxRows ? rows : kMaxRows;
  int64_t loops = tiles * rows / resident;
  loops = loops < 1 ? 1 : (loops > policy.tiles_per_thread ? policy.tiles_per_thread : loops);
  Grid grid;
  grid.blocks = dim3(static_cast<unsigned>(ceil_div(tiles, loops)), static_cast<unsigned>(rows_y),
                     static_cast<unsigned>(ceil_div(rows, rows_y)));
  grid.threads = dim3(across, samples);
  return grid;
}

}  // namespace fastdiff
