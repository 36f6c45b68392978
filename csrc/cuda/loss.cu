// Launchers (csrc/include/params.h) of losses: the kernel made for a structure, or the one for any.
#include <type_traits>

#include "launch.cuh"
#include "loss.cuh"
#include "loss_grad.cuh"

namespace fastdiff {
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
