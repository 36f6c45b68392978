// What a binding hands to a launcher: plain structs, no torch. All tensors are contiguous, all
// pointers belong to one device, and fastdiff/ops/ has checked them. Meaning: fastdiff/ops/*.py.
#pragma once

#include "dtype.h"

namespace fastdiff {

constexpr int kMaxStates = 8;
constexpr int kMaxOutputs = 8;
constexpr int kMaxDraws = 4;
constexpr int kHeader = 5;  // lo, hi, c_in, half_log_variance_min, half_log_variance_max

struct Operand {
  void* data;
  DType dtype;
};

struct StepParams {
  int64_t batch;  // samples
  int64_t n;      // elements per sample
  int32_t states, model_outputs, outputs, draws;
  DType noise_dtype;
  bool learned, fast, seeded;
  int32_t clamp_mask;                // over [S, o, z]; -1: no clamp node
  int32_t output_mask[kMaxOutputs];  // over [S, o, c, z]
  Operand state[kMaxStates];
  Operand model_output[2];  // [o] or [o_uncond, o_cond]; 2 n elements a sample when learned
  Operand noise[kMaxDraws];
  Operand out[kMaxOutputs];
  Operand model_input;  // data null: none
  int32_t model_input_copies;
  const void* table;  // (table_rows, table_width)
  DType table_dtype;  // f32 or f64: also the type of the arithmetic
  int64_t table_rows, table_width;
  const int64_t* rows;        // entry b at rows[b * rows_stride]
  int64_t rows_stride;        // 1, or 0: one row for the whole batch; the strides below likewise
  const int64_t* keys;        // (B, 2) or null: (seed, sample_offset + b)
  const int64_t* draw_table;  // (table_rows, draws, 2) of (step, stream), or null: step, stream
  int64_t seed, sample_offset, step, stream;
  const float* guidance_scale;
  int64_t guidance_stride;
  const float* threshold;  // null: bounds from the table
  int64_t threshold_stride;
};

struct RandnParams {
  Operand out;
  int64_t batch, n;
  const int64_t* keys;
  int64_t seed, sample_offset, step, stream, first_block;
  bool fast;
};

struct ChainParams {
  int64_t batch, n, steps;  // steps = T
  Operand x_start;
  Operand noise;      // (T, B, n); data null: seeded
  Operand out;        // (K, B, n)
  const void* table;  // (T, 2)
  DType table_dtype;
  const int64_t* slots;  // (T,)
  const int64_t* keys;
  int64_t seed, sample_offset;
  bool fast;
};

constexpr int kPiece = 1024;  // elements whose sum is one entry of `partials`

// Of `loss` and `loss_grad`; the masks and flags are those of LossSpec.
struct LossParams {
  int64_t batch, n;
  int32_t model_outputs;  // 1 or 2: [o] or [o_uncond, o_cond]; 2 n elements a sample when learned
  int32_t terms;          // LossTerm bits (loss.h)
  int32_t error;          // over [x, y, o, c, z]
  int32_t bound;          // over [x, y, o, c]
  int32_t clamp;          // over [y, o]; -1: no c
  int32_t rho;            // Rho (loss.h)
  bool density, learned, frozen, makes, fast, keeps_slopes;
  bool seeded;  // z is made; where it is not, and noise.data is null, there is none
  DType noise_dtype;
  Operand model_output[2];
  Operand x, y, noise;  // data null: not an input
  const void* table;    // (table_rows, kLossColumns)
  DType table_dtype;    // f32 or f64: also the type of the arithmetic, results and gradients
  int64_t table_rows;
  const int64_t* rows;  // entry b at rows[b * rows_stride]
  int64_t rows_stride;  // 1, or 0: one row for the whole batch
  const int64_t* keys;  // as in StepParams
  int64_t seed, sample_offset, step, stream;
  const float* guidance_scale;
  int64_t guidance_stride;
  // loss
  void* results;   // (K, B), K the terms there are
  void* partials;  // (K, B, pieces): memory for the sums over pieces of kPiece elements
  int64_t pieces;  // at least 1
  Operand made;    // x where it is made
  void* slopes;    // (B, n) where they are kept, by a CPU
  // loss_grad
  const void* results_grad;  // (K, B)
  Operand grad[2];           // of the shape of each model output
};

// Of `bits`; of fastdiff/ops/bits.py like the next.
struct BitsParams {
  int64_t batch, n;
  Operand logits, x;  // data null: not an input
  Operand out;        // may be u8, as x
  const void* table;  // (table_rows, table_width)
  DType table_dtype;  // f32 or f64: also the type of the arithmetic
  int64_t table_rows, table_width;
  const int64_t* rows;  // as in StepParams, and keys
  int64_t rows_stride;
  const int64_t* keys;
  int64_t seed, sample_offset, step, stream;
};

// Of `bits_bound` and `bits_bound_grad`.
struct BitsBoundParams {
  int64_t batch, n;
  bool mixture;
  Operand logits, x_t, x_start;  // the bits may be u8
  const void* table;             // (table_rows, table_width)
  DType table_dtype;
  int64_t table_rows, table_width;
  const int64_t* rows;
  int64_t rows_stride;
  // bits_bound
  void* results;           // (B,)
  void* partials;          // (B, partial_stride): memory for the sums of parts of a sample
  int64_t partial_stride;  // at least the sum over k > 0 of ceil(n / 32^k)
  // bits_bound_grad
  const void* gradients;  // (B,)
  Operand gradient;       // of the shape of the logits
};

// Supplied by csrc/cpu/dispatch.cpp or csrc/cuda/*.cu, whichever the library is linked with.
// stream is a cudaStream_t (null on the CPU). Returns 0, or the cudaError_t of the launch.
int launch_randn(const RandnParams& params, void* stream);
int launch_step(const StepParams& params, void* stream);
int launch_chain(const ChainParams& params, void* stream);
int launch_bits(const BitsParams& params, void* stream);
int launch_bits_bound(const BitsBoundParams& params, void* stream);
int launch_bits_bound_grad(const BitsBoundParams& params, void* stream);
int launch_loss(const LossParams& params, void* stream);
int launch_loss_grad(const LossParams& params, void* stream);

}  // namespace fastdiff
