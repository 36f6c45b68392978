// Chooses the ISA level, and splits operations over torch's threads.
#include <atomic>
#include <fstream>
#include <string>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "kernels.h"

namespace fastdiff {

namespace portable {
extern const Kernels kernels;
}
#if defined(FASTDIFF_HAVE_AVX2)
namespace avx2 {
extern const Kernels kernels;
}
#endif
#if defined(FASTDIFF_HAVE_AVX512)
namespace avx512 {
extern const Kernels kernels;
}
#endif
#if defined(FASTDIFF_HAVE_AVX512_BF16)
namespace avx512_bf16 {
extern const Kernels kernels;
}
#endif

namespace {

#if defined(__x86_64__)
// The x86-64-v3 and -v4 feature sets, part by part: g++ 11 does not know the levels by name, and
// f16c not at all. No CPU has fma and avx2 but not f16c, lzcnt and movbe.
bool has_v3() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
}
bool has_v4() {
  return has_v3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}
#endif

// What this CPU runs, best first.
template <class Visit>
void each_level(const Visit& visit) {
#if defined(FASTDIFF_HAVE_AVX512_BF16)
  if (has_v4() && __builtin_cpu_supports("avx512bf16")) visit(avx512_bf16::kernels);
#endif
#if defined(FASTDIFF_HAVE_AVX512)
  if (has_v4()) visit(avx512::kernels);
#endif
#if defined(FASTDIFF_HAVE_AVX2)
  if (has_v3()) visit(avx2::kernels);
#endif
  visit(portable::kernels);
}

const Kernels* best_level() {
  const Kernels* best = nullptr;
  each_level([&](const Kernels& level) {
    if (!best) best = &level;
  });
  return best;
}

std::atomic<const Kernels*> current{best_level()};

const Kernels& kernels() { return *current.load(std::memory_order_relaxed); }

// Below these many elements a thread is not worth waking (random numbers cost 4x a plain sum).
constexpr int64_t kNoiseGrain = 8192, kPlainGrain = 32768;

template <class Params>
int run(void (*kernel)(const Params&, int64_t, int64_t), const Params& params, int64_t grain) {
  const int64_t blocks = params.batch * blocks_per_sample(params.n);
  // Short samples have blocks of their own, whose fixed cost is that of some 64 elements.
  const int64_t elements = params.n < 64 ? 64 : params.n < kBlock ? params.n : kBlock;
  const int64_t grain_blocks = grain < elements ? 1 : grain / elements;
  if (blocks <= grain_blocks) {
    kernel(params, 0, blocks);
  } else {
    torch::stable::parallel_for(0, blocks, grain_blocks,
                                [&](int64_t first, int64_t last) { kernel(params, first, last); });
  }
  return 0;
}

// Names of the levels that this CPU runs, best first, with commas.
std::string isa_levels() {
  std::string names;
  each_level([&](const Kernels& level) {
    if (!names.empty()) names += ",";
    names += level.isa;
  });
  return names;
}

// The level in use; first, unless `force` is empty, the one named so, if this CPU has it.
std::string isa(const std::string& force) {
  const Kernels* chosen = nullptr;
  each_level([&](const Kernels& level) {
    if (force == level.isa) chosen = &level;
  });
  STD_TORCH_CHECK(chosen || force.empty(), "isa must be one of ", isa_levels(), ", not ", force);
  if (chosen) current = chosen;
  return kernels().isa;
}

}  // namespace

// The size that the kernel tells, which knows what a virtual machine was given: sysconf() asks the
// processor and gets the sum over a whole package. A step has three such tensors or more, so of a
// larger cache nothing is left either.
int64_t streamed_bytes() {
  static const int64_t kBytes = [] {
    constexpr int64_t kMost = int64_t{32} << 20;
    std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index3/size");
    int64_t kilobytes = 0;
    char unit = 0;
    const bool known = file >> kilobytes >> unit && unit == 'K' && kilobytes << 10 < kMost;
    return known ? kilobytes << 10 : kMost;
  }();
  return kBytes;
}

int launch_randn(const RandnParams& params, void*) {
  return run(kernels().randn, params, kNoiseGrain);
}

int launch_step(const StepParams& params, void*) {
  if (params.seeded) return run(kernels().step, params, kNoiseGrain);
  const bool by_sample = params.rows_stride || params.guidance_stride || params.threshold_stride;
  if (by_sample || params.learned) return run(kernels().step, params, kPlainGrain);
  StepParams flat = params;  // nothing depends on the sample: one sample, with one tail
  flat.n *= flat.batch;
  flat.batch = 1;
  return run(kernels().step, flat, kPlainGrain);
}

int launch_chain(const ChainParams& params, void*) {
  const int64_t grain = params.noise.data ? kPlainGrain : kNoiseGrain;
  const int64_t steps = params.steps < 1 ? 1 : params.steps;
  return run(kernels().chain, params, grain / steps);
}

int launch_bits(const BitsParams& params, void*) {
  return run(kernels().bits, params, kNoiseGrain);
}

int launch_bits_bound(const BitsBoundParams& params, void*) {
  run(kernels().bits_bound, params, kNoiseGrain);
  kernels().bits_bound_sum(params, 0, params.batch);
  return 0;
}

int launch_bits_bound_grad(const BitsBoundParams& params, void*) {
  return run(kernels().bits_bound_grad, params, kNoiseGrain);
}

int launch_loss(const LossParams& params, void*) {
  const bool dear = params.seeded || params.terms & 2;  // exp and log, in the bound
  run(kernels().loss, params, dear ? kNoiseGrain : kPlainGrain);
  kernels().loss_results(params);
  return 0;
}

int launch_loss_grad(const LossParams& params, void*) {
  const bool dear = params.seeded || params.terms & 2;
  return run(kernels().loss_grad, params, dear ? kNoiseGrain : kPlainGrain);
}

}  // namespace fastdiff

// Test entry: see Kernels::box_muller.
extern "C" __attribute__((visibility("default"))) void fastdiff_box_muller(const uint32_t* a,
                                                                           const uint32_t* b,
                                                                           float* z0, float* z1,
                                                                           int64_t n) {
  fastdiff::kernels().box_muller(a, b, z0, z1, n);
}

STABLE_TORCH_LIBRARY_FRAGMENT(fastdiff_native, m) {
  m.def("isa(str force) -> str");
  m.def("isa_levels() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(fastdiff_native, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&fastdiff::isa));
  m.impl("isa_levels", TORCH_BOX(&fastdiff::isa_levels));
}
