// Launchers (csrc/include/params.h) of steps, noise and the chain: which kernel, on what grid.
#include <type_traits>

#include "chain.cuh"
#include "launch.cuh"
#include "plain.cuh"
#include "randn.cuh"
#include "step.cuh"

namespace fastdiff {
namespace {

template <class Action>
int for_each_operand(const StepParams& p, Action action) {
  int found = 0;
  for (int k = 0; k < p.states; ++k) found += action(p.state[k]);
  for (int k = 0; k < p.model_outputs; ++k) found += action(p.model_output[k]);
  for (int k = 0; k < p.draws && !p.seeded; ++k) found += action(p.noise[k]);
  for (int k = 0; k < p.outputs; ++k) found += action(p.out[k]);
  return found + action(p.model_input);
}

// Entries of a table are counted in 32 bits too.
bool fits(const StepParams& p) {
  return fastdiff::fits(p.batch, p.n) && p.table_rows < kMostSamples / p.table_width;
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

}  // namespace fastdiff
