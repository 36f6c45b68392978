// How kernels are launched: what is known of each GPU, the grid, and the launch itself. No launcher
// allocates, synchronizes or reads the device, so every launch can be captured in a CUDA graph.
#pragma once

#include "memory.cuh"

#if defined(FASTDIFF_CUDA_HOST)
#define FD_LAUNCH(kernel, grid, stream, ...) \
  ((void)(stream), fd_launch_on_host<kernel>((grid).blocks, (grid).threads, __VA_ARGS__))
#define FD_LAUNCH_WAITING(kernel, grid, stream, ...) \
  ((void)(stream), fd_launch_fibers_on_host<kernel>((grid).blocks, (grid).threads, __VA_ARGS__))
#else
#define FD_LAUNCH(kernel, grid, stream, ...) \
  (kernel<<<(grid).blocks, (grid).threads, 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__))
#define FD_LAUNCH_WAITING FD_LAUNCH  // of a kernel whose threads wait for each other
#endif

namespace fastdiff {

constexpr int kThreads = 256;  // a block, everywhere: 8 warps divide every occupancy below evenly

// What is known of a GPU, by compute capability. Nothing here has been measured: bandwidth and
// multiprocessors are published figures, of the member of the family with the most bandwidth for
// each multiprocessor.
struct Policy {
  int capability;
  int resident_blocks;   // of kThreads an SM; 65536 / kThreads / resident_blocks registers each
  int tiles_per_thread;  // at most, once the GPU is full
  int gigabytes_per_second, multiprocessors;

  // Bytes that an SM must have asked for at any time to keep memory busy: Little's law.
  constexpr int bytes_in_flight() const {
    return static_cast<int>(kLatency * gigabytes_per_second / multiprocessors);
  }
  static constexpr int64_t kLatency = 800;  // ns from load to use under load: assumed, not measured
};

// resident_blocks is threads an SM / kThreads, but for 10.3, where the compiler (nvcc 13.0) needs
// up to 40 registers for what takes 32 elsewhere. Tiles: the work before the first load (row,
// coefficients, keys: 80 to 120 instructions) is paid once per thread.
constexpr Policy kPolicies[] = {
    {75, 4, 8, 320, 40},     // T4; 1024 threads an SM, up to 64 registers each
    {80, 8, 8, 2039, 108},   // A100 80 GB SXM; 2048 threads, 32 registers
    {86, 6, 8, 936, 82},     // RTX 3090; 1536 threads, 40 registers
    {87, 6, 8, 205, 16},     // Jetson AGX Orin
    {89, 6, 8, 1008, 128},   // RTX 4090
    {90, 8, 8, 4800, 132},   // H200
    {100, 8, 8, 8000, 148},  // B200
    {103, 6, 8, 8000, 148},  // B300
    {110, 6, 8, 273, 20},    // Jetson AGX Thor
    {120, 6, 8, 1792, 170},  // RTX 5090
    {121, 6, 8, 273, 48},    // GB10
};
constexpr Policy kUnknown = {0, 6, 8, 8000,
                             148};  // 40 registers fit every GPU's thread limit so far

// Every thread has a 128-bit load under way before it computes, and most have two.
constexpr bool covers_latency(const Policy& policy) {
  return policy.resident_blocks * kThreads * 32 >= policy.bytes_in_flight();
}
constexpr bool all_cover_latency() {
  for (const Policy& row : kPolicies) {
    if (!covers_latency(row)) return false;
  }
  return covers_latency(kUnknown);
}
static_assert(all_cover_latency(), "fewer bytes in flight than the memory needs");

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

// For `rows` times `tiles` blocks of work, each for `threads`. Once there are two for every place
// on the GPU a block works through several, so many that the last wave of blocks is full too.
inline Grid tiled_grid(int64_t tiles, int64_t rows, dim3 threads) {
  int multiprocessors = 1;
  const Policy& policy = current_policy(multiprocessors);
  const int64_t places = policy.resident_blocks * kThreads / (threads.x * threads.y);
  const int64_t resident = multiprocessors * places;
  const int64_t rows_y = rows < kMaxRows ? rows : kMaxRows;
  int64_t loops = 1;
  if (tiles * rows >= 2 * resident) {
    const int64_t waves = ceil_div(tiles * rows, resident * policy.tiles_per_thread);
    loops = ceil_div(tiles * rows, resident * waves);
  }
  Grid grid;
  grid.blocks = dim3(static_cast<unsigned>(ceil_div(tiles, loops)), static_cast<unsigned>(rows_y),
                     static_cast<unsigned>(ceil_div(rows, rows_y)));
  grid.threads = threads;
  return grid;
}

// Small samples share a block (its y); large ones are cut into tiles.
inline Grid make_grid(int64_t batch, int64_t n, int width) {
  int across = kWarp;
  while (across < kThreads && static_cast<int64_t>(across) * width < n) across *= 2;
  const int samples = kThreads / across;
  const int64_t tiles = ceil_div(n, static_cast<int64_t>(across) * width);
  return tiled_grid(tiles, ceil_div(batch, samples), dim3(across, samples));
}

// ---- what launchers ask of operands

inline int size_of(DType dtype) { return dtype == DType::f32 ? 4 : dtype == DType::u8 ? 1 : 2; }

// Whether every sample of an operand (and every plane of samples) starts on 128 bits. An operand
// that is not there is no obstacle. With one sample in one plane its length does not matter.
inline bool is_aligned(const Operand& operand, int64_t n, bool single) {
  if (!operand.data) return true;
  const auto address = reinterpret_cast<uintptr_t>(operand.data);
  return address % 16 == 0 && (single || n * size_of(operand.dtype) % 16 == 0);
}

inline bool is_f64(const Operand& operand) { return operand.data && operand.dtype == DType::f64; }

// What 32-bit indices of samples and of Philox blocks reach.
constexpr int64_t kMostSamples = int64_t{1} << 31, kMostElements = int64_t{1} << 34;

inline bool fits(int64_t batch, int64_t n) { return batch <= kMostSamples && n <= kMostElements; }

}  // namespace fastdiff
