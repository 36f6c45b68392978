// The launchers of csrc/include/params.h for CUDA: which kernel, on what grid. Nothing here
// allocates, synchronizes or reads the device, so every launch can be captured in a CUDA graph.
#include <type_traits>

#include "bits.cuh"
#include "chain.cuh"
#include "launch.cuh"
#include "loss.cuh"
#include "loss_grad.cuh"
#include "plain.cuh"
#include "randn.cuh"
#include "step.cuh"

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
namespace {

int size_of(DType dtype) { return dtype == DType::f32 ? 4 : dtype == DType::u8 ? 1 : 2; }

// Whether every sample of an operand (and every plane of samples) starts on 128 bits. An operand
// that is not there is no obstacle. With one sample in one plane its length does not matter.
bool is_aligned(const Operand& operand, int64_t n, bool single) {
  if (!operand.data) return true;
  const auto address = reinterpret_cast<uintptr_t>(operand.data);
  return address % 16 == 0 && (single || n * size_of(operand.dtype) % 16 == 0);
}

bool is_f64(const Operand& operand) { return operand.data && operand.dtype == DType::f64; }

template <class Action>
int for_each_operand(const StepParams& p, Action action) {
  int found = 0;
  for (int k = 0; k < p.states; ++k) found += action(p.state[k]);
  for (int k = 0; k < p.model_outputs; ++k) found += action(p.model_output[k]);
  for (int k = 0; k < p.draws && !p.seeded; ++k) found += action(p.noise[k]);
  for (int k = 0; k < p.outputs; ++k) found += action(p.out[k]);
  return found + action(p.model_input);
}

// What 32-bit indices of samples and of Philox blocks reach.
constexpr int64_t kMostSamples = int64_t{1} << 31, kMostElements = int64_t{1} << 34;

bool fits(int64_t batch, int64_t n) { return batch <= kMostSamples && n <= kMostElements; }

// Entries of a table are counted in 32 bits too.
bool fits(const StepParams& p) {
  return fits(p.batch, p.n) && p.table_rows < kMostSamples / p.table_width;
}

// A step in which all samples are treated alike is one long sample: elements of neighbouring
// samples share a 128-bit access even where samples are not multiples of it.
StepParams flattened(StepParams p) {
  const bool alike = p.n <= kMostElements / p.batch && p.rows_stride == 0 && !p.learned &&
                     !(p.draws && p.seeded) && (p.model_outputs < 2 || p.guidance_stride == 0) &&
                     (!p.threshold || p.threshold_stride == 0);
  if (alike) {
    p.n *= p.batch;
    p.batch = 1;
  }
  return p;
}

template <int kOutputs>
int start_step(const StepParams& p, bool aligned, void* stream) {
  const Grid grid = make_grid(p.batch, p.n, StepLayout<kOutputs>::kWidth);
  FD_LAUNCH(step_kernel<kOutputs>, grid, stream, p, aligned);
  return cudaGetLastError();
}

template <class P>
int start_plain(const StepParams& p, void* stream) {
  const Grid grid = make_grid(p.batch, p.n, P::L::kWidth);
  PlainParams params;
  params.step = p;
  params.last = static_cast<uint32_t>(p.n / 4 - 1);
  params.stride = grid.blocks.x * grid.threads.x * P::L::kGroups;
  params.copy = p.batch * p.n * static_cast<int64_t>(sizeof(typename P::Model));
  FD_LAUNCH(plain_kernel<P>, grid, stream, params);
  return cudaGetLastError();
}

template <class Action>
int with_bool(bool value, Action action) {
  return value ? action(std::true_type()) : action(std::false_type());
}

template <class State, class Model, int kModels, bool kClamp>
int start_plain_noise(const StepParams& p, void* stream) {
  if constexpr (kModels > 0) {
    if (p.draws == 0)
      return start_plain<Plain<State, Model, kModels, kClamp, false, false>>(p, stream);
  }
  return with_bool(p.fast, [&](auto fast) {
    return start_plain<Plain<State, Model, kModels, kClamp, true, fast()>>(p, stream);
  });
}

template <class State, class Model>
int start_plain_typed(const StepParams& p, void* stream) {
  if constexpr (std::is_same<State, Model>::value) {
    if (p.model_outputs == 0) return start_plain_noise<State, Model, 0, false>(p, stream);
  }
  return with_bool(p.model_outputs == 2, [&](auto guided) {
    return with_bool(p.clamp_mask >= 0, [&](auto clamp) {
      return start_plain_noise<State, Model, guided() ? 2 : 1, clamp()>(p, stream);
    });
  });
}

// Whether plain.cuh covers the structure of the step.
bool is_plain(const StepParams& p) {
  const bool model = p.model_outputs > 0, clamp = p.clamp_mask >= 0, noise = p.draws == 1;
  if (p.states != 1 || p.outputs != 1 || p.draws > 1 || p.learned || p.threshold) return false;
  if (clamp ? p.clamp_mask != 3 || !model : !model && !noise) return false;
  if (p.output_mask[0] != (1 | (model && !clamp) << 1 | clamp << 2 | noise << 3)) return false;
  const DType state = p.state[0].dtype, other = model ? p.model_output[0].dtype : state;
  return p.out[0].dtype == state && (!noise || (p.seeded && p.noise_dtype == state)) &&
         (p.model_outputs < 2 || p.model_output[1].dtype == other) &&
         (!p.model_input.data || p.model_input.dtype == other);
}

}  // namespace

int launch_step(const StepParams& params, void* stream) {
  if (params.batch == 0 || params.n == 0) return cudaSuccess;
  if (params.table_dtype != DType::f32 || for_each_operand(params, is_f64)) {
    return cudaErrorNotSupported;
  }
  if (!fits(params)) return cudaErrorInvalidValue;
  StepParams p = flattened(params);
  if (!p.model_input.data) p.model_input_copies = 0;
  const bool aligned = !for_each_operand(p, [&](const Operand& operand) {
    const bool single = p.batch == 1 && !p.learned && &operand != &p.model_input;
    return !is_aligned(operand, p.n, single);
  });
  if (aligned && is_plain(p)) {
    const DType state = p.state[0].dtype;
    const DType model = p.model_outputs > 0 ? p.model_output[0].dtype : state;
    if (state == DType::f32 && model == DType::f32 && p.n % 4 == 0) {
      return start_plain_typed<float, float>(p, stream);
    }
    if (p.n % 8 == 0) {
      if (state == DType::f32 && model == DType::bf16) {
        return start_plain_typed<float, bf16_t>(p, stream);
      }
      if (state == DType::f32 && model == DType::f16) {
        return start_plain_typed<float, f16_t>(p, stream);
      }
      if (state == DType::bf16 && model == DType::bf16) {
        return start_plain_typed<bf16_t, bf16_t>(p, stream);
      }
      if (state == DType::f16 && model == DType::f16) {
        return start_plain_typed<f16_t, f16_t>(p, stream);
      }
    }
  }
  if (p.outputs <= 1) return start_step<1>(p, aligned, stream);
  if (p.outputs <= 2) return start_step<2>(p, aligned, stream);
  if (p.outputs <= 4) return start_step<4>(p, aligned, stream);
  return start_step<8>(p, aligned, stream);
}

int launch_randn(const RandnParams& p, void* stream) {
  if (p.batch == 0 || p.n == 0) return cudaSuccess;
  if (!fits(p.batch, p.n)) return cudaErrorInvalidValue;
  const bool aligned = is_aligned(p.out, p.n, p.batch == 1);
  const Grid grid = make_grid(p.batch, p.n, 8);
  const auto start = [&](auto layout, auto type) {
    using L = decltype(layout);
    using T = typename decltype(type)::Type;
    if (p.fast) {
      FD_LAUNCH((randn_kernel<L, T, true>), grid, stream, p, aligned);
    } else {
      FD_LAUNCH((randn_kernel<L, T, false>), grid, stream, p, aligned);
    }
  };
  switch (p.out.dtype) {
    case DType::f32:
      start(Layout<8, true>(), Identity<float>());
      break;
    case DType::bf16:
      start(Layout<8, false>(), Identity<bf16_t>());
      break;
    case DType::f16:
      start(Layout<8, false>(), Identity<f16_t>());
      break;
    default:
      return cudaErrorNotSupported;
  }
  return cudaGetLastError();
}

int launch_chain(const ChainParams& p, void* stream) {
  if (p.batch == 0 || p.n == 0 || p.steps == 0) return cudaSuccess;
  if (p.table_dtype != DType::f32 || is_f64(p.noise)) return cudaErrorNotSupported;
  if (p.x_start.dtype != p.out.dtype || !fits(p.batch, p.n)) return cudaErrorInvalidValue;
  const bool aligned = is_aligned(p.x_start, p.n, false) && is_aligned(p.noise, p.n, false) &&
                       is_aligned(p.out, p.n, false);
  const Grid grid = make_grid(p.batch, p.n, 8);
  switch (p.out.dtype) {
    case DType::f32:
      FD_LAUNCH(chain_kernel<float>, grid, stream, p, aligned);
      break;
    case DType::bf16:
      FD_LAUNCH(chain_kernel<bf16_t>, grid, stream, p, aligned);
      break;
    case DType::f16:
      FD_LAUNCH(chain_kernel<f16_t>, grid, stream, p, aligned);
      break;
    default:
      return cudaErrorNotSupported;
  }
  return cudaGetLastError();
}

int launch_bits(const BitsParams& p, void* stream) {
  if (p.batch == 0 || p.n == 0) return cudaSuccess;
  if (p.table_dtype != DType::f32 || is_f64(p.logits) || is_f64(p.x) || is_f64(p.out)) {
    return cudaErrorNotSupported;
  }
  if (!fits(p.batch, p.n)) return cudaErrorInvalidValue;
  const bool aligned = is_aligned(p.logits, p.n, false) && is_aligned(p.x, p.n, false) &&
                       is_aligned(p.out, p.n, false);
  const Grid grid = make_grid(p.batch, p.n, 8);
  if (p.logits.data) {
    FD_LAUNCH(bits_kernel<true>, grid, stream, p, aligned);
  } else {
    FD_LAUNCH(bits_kernel<false>, grid, stream, p, aligned);
  }
  return cudaGetLastError();
}

namespace {

// 0, or why the kernels do not serve these tensors.
int refusal(const BitsBoundParams& p) {
  if (p.table_dtype != DType::f32 || is_f64(p.logits) || is_f64(p.x_t) || is_f64(p.x_start) ||
      is_f64(p.gradient)) {
    return cudaErrorNotSupported;
  }
  return fits(p.batch, p.n) ? cudaSuccess : cudaErrorInvalidValue;
}

bool is_aligned(const BitsBoundParams& p) {
  return is_aligned(p.logits, p.n, false) && is_aligned(p.x_t, p.n, false) &&
         is_aligned(p.x_start, p.n, false) && is_aligned(p.gradient, p.n, false);
}

}  // namespace

int launch_bits_bound(const BitsBoundParams& p, void* stream) {
  if (p.batch == 0 || p.n == 0) return cudaSuccess;
  if (const int error = refusal(p)) return error;
  Grid grid = make_grid(p.batch, p.n, kLeaf);
  if (p.mixture) {
    FD_LAUNCH(bits_bound_kernel<true>, grid, stream, p, is_aligned(p));
  } else {
    FD_LAUNCH(bits_bound_kernel<false>, grid, stream, p, is_aligned(p));
  }
  int64_t first = 0;
  for (int64_t count = ceil_div(p.n, kLeaf); count > 1; count = ceil_div(count, kLeaf)) {
    grid = make_grid(p.batch, count, kLeaf);
    FD_LAUNCH(bits_bound_sum_kernel, grid, stream, p, first, count);
    first += count;
  }
  return cudaGetLastError();
}

int launch_bits_bound_grad(const BitsBoundParams& p, void* stream) {
  if (p.batch == 0 || p.n == 0) return cudaSuccess;
  if (const int error = refusal(p)) return error;
  const Grid grid = make_grid(p.batch, p.n, 8);
  if (p.mixture) {
    FD_LAUNCH(bits_bound_grad_kernel<true>, grid, stream, p, is_aligned(p));
  } else {
    FD_LAUNCH(bits_bound_grad_kernel<false>, grid, stream, p, is_aligned(p));
  }
  return cudaGetLastError();
}

namespace {

template <class Action>
int for_each_operand(const LossParams& p, Action action) {
  int found = action(p.x) + action(p.y) + action(p.noise) + action(p.made);
  for (int k = 0; k < 2; ++k) found += action(p.model_output[k]) + action(p.grad[k]);
  return found;
}

int refusal(const LossParams& p) {
  if (p.table_dtype != DType::f32 || p.keeps_slopes || for_each_operand(p, is_f64)) {
    return cudaErrorNotSupported;
  }
  return fits(p.batch, p.n) ? cudaSuccess : cudaErrorInvalidValue;
}

// Pieces of samples to blocks of as many warps as one piece occupies.
template <class S>
Grid piece_grid(const LossParams& p) {
  const int64_t chunks = ceil_div(p.n < kPiece ? p.n : kPiece, S::L::kWidth);
  // A warp of a split layout begins with the elements of its first row alone.
  const int64_t warps = ceil_div(chunks > 0 ? chunks : 1, kWarp);
  return tiled_grid(p.pieces, p.batch, dim3(static_cast<unsigned>(kWarp * warps)));
}

struct StartLoss {
  template <class S>
  static int start(const LossParams& p, bool aligned, void* stream) {
    FD_LAUNCH_WAITING(loss_kernel<S>, piece_grid<S>(p), stream, p, aligned);
    return cudaGetLastError();
  }
};

struct StartLossGrad {
  template <class S>
  static int start(const LossParams& p, bool aligned, void* stream) {
    FD_LAUNCH(loss_grad_kernel<S>, make_grid(p.batch, p.n, S::L::kWidth), stream, p, aligned);
    return cudaGetLastError();
  }
};

// Whether the tensors of model outputs are of dtype `model` and all others of `state`.
bool are_of(const LossParams& p, DType state, DType model) {
  return !for_each_operand(p, [&](const Operand& operand) {
    const bool of_model = &operand == p.model_output || &operand == p.grad;
    return operand.data && operand.dtype != (of_model ? model : state);
  });
}

// Starts the kernel made for the structure, if it is that of the loss.
template <class Start, class Structure, class X, class O>
bool start_if(const LossParams& p, void* stream, int* error) {
  const LossFacts facts = LossFacts::of(p);
  if (!(facts == Structure::facts(facts.fast))) return false;
  if constexpr (Structure::kDraws) {
    if (facts.fast) {
      *error = Start::template start<KnownLoss<Structure, X, O, true>>(p, true, stream);
      return true;
    }
  }
  *error = Start::template start<KnownLoss<Structure, X, O, false>>(p, true, stream);
  return true;
}

template <class Start, class X, class O>
bool start_known(const LossParams& p, void* stream, int* error) {
  // Of noise and a model output alone X says nothing; a variance is learned in float32 as a rule.
  if constexpr (std::is_same_v<X, O>) {
    if (start_if<Start, NoiseError, X, O>(p, stream, error)) return true;
  }
  if constexpr (std::is_same_v<X, float>) {
    if (start_if<Start, Hybrid, X, O>(p, stream, error) ||
        start_if<Start, ClippedHybrid, X, O>(p, stream, error)) {
      return true;
    }
  }
  return start_if<Start, TargetError, X, O>(p, stream, error) ||
         start_if<Start, VelocityError, X, O>(p, stream, error) ||
         start_if<Start, StepDensity, X, O>(p, stream, error);
}

template <class Start>
int start_loss(const LossParams& p, void* stream) {
  const bool aligned = !for_each_operand(p, [&](const Operand& operand) {
    return !is_aligned(operand, p.n, p.batch == 1 && !p.learned);
  });
  int error = cudaSuccess;
  if (aligned && p.n > 0 && p.n % 4 == 0 && are_of(p, DType::f32, DType::f32)) {
    if (start_known<Start, float, float>(p, stream, &error)) return error;
  }
  if (aligned && p.n > 0 && p.n % 8 == 0) {
    if (are_of(p, DType::bf16, DType::bf16) &&
        start_known<Start, bf16_t, bf16_t>(p, stream, &error)) {
      return error;
    }
    if (are_of(p, DType::f32, DType::bf16) &&
        start_known<Start, float, bf16_t>(p, stream, &error)) {
      return error;
    }
  }
  return Start::template start<AnyLoss>(p, aligned, stream);
}

}  // namespace

int launch_loss(const LossParams& p, void* stream) {
  if (p.batch == 0) return cudaSuccess;
  if (const int error = refusal(p)) return error;
  if (const int error = start_loss<StartLoss>(p, stream)) return error;
  const int64_t results = (p.terms & 1) + (p.terms >> 1 & 1) + (p.terms >> 2 & 1);
  int64_t stride = 1;
  for (int64_t count = p.pieces; count > 1; count = ceil_div(count, kPiece), stride *= kPiece) {
    const int64_t warps = ceil_div(count < kPiece ? count : kPiece, 4 * kWarp);
    const Grid grid = tiled_grid(ceil_div(count, kPiece), results * p.batch,
                                 dim3(static_cast<unsigned>(kWarp * warps)));
    FD_LAUNCH_WAITING(loss_sum_kernel, grid, stream, p, count, stride);
  }
  return cudaGetLastError();
}

int launch_loss_grad(const LossParams& p, void* stream) {
  if (p.batch == 0 || p.n == 0) return cudaSuccess;
  if (const int error = refusal(p)) return error;
  return start_loss<StartLossGrad>(p, stream);
}

}  // namespace fastdiff
