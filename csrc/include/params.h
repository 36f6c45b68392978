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

// Supplied by csrc/cpu/dispatch.cpp or csrc/cuda/kernels.cu, whichever the library is linked with.
// stream is a cudaStream_t (null on the CPU). Returns 0, or the cudaError_t of the launch.
int launch_randn(const RandnParams& params, void* stream);
int launch_step(const StepParams& params, void* stream);
int launch_chain(const ChainParams& params, void* stream);

}  // namespace fastdiff
