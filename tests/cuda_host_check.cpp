// Runs the CUDA launchers, compiled for the host, on buffers of exactly their tensors' sizes, for
// the sanitizers that tests/test_cuda_sources.py compiles this with. Prints what went wrong.
#include <cstdio>
#include <memory>
#include <vector>

#include "include/bits.h"
#include "include/loss.h"
#include "include/params.h"

namespace {

using namespace fastdiff;

int failures = 0;

void expect(bool condition, const char* what) {
  if (!condition) {
    std::printf("%s\n", what);
    ++failures;
  }
}

// Keeps every buffer of one launch; each starts `offset` elements after an aligned address, where
// its bytes end exactly.
struct Buffers {
  int64_t offset;
  std::vector<std::unique_ptr<char[]>> kept;

  Operand operator()(DType dtype, int64_t elements) {
    const int64_t size = dtype == DType::f32 ? 4 : dtype == DType::u8 ? 1 : 2;
    kept.emplace_back(new char[static_cast<size_t>((elements + offset) * size)]());
    return {kept.back().get() + offset * size, dtype};
  }
};

constexpr DType kTypes[] = {DType::f32, DType::bf16, DType::f16};
constexpr int64_t kSizes[] = {1, 3, 4, 7, 8, 12, 127, 128, 132, 136, 256, 264, 1023, 4097, 9000};

void check_randn(DType dtype, int64_t n, int64_t offset) {
  Buffers buffer{offset, {}};
  RandnParams p{};
  p.out = buffer(dtype, 3 * n);
  p.batch = 3;
  p.n = n;
  expect(launch_randn(p, nullptr) == 0, "randn failed");
}

// Columns [S0, o, c, z] of `states` states, all used.
void check_step(DType state, DType model, int64_t n, int64_t offset, int states, int outputs,
                bool clamped, int64_t rows_stride) {
  Buffers buffer{offset, {}};
  StepParams p{};
  p.batch = 3;
  p.n = n;
  p.states = states;
  p.model_outputs = 2;
  p.outputs = outputs;
  p.draws = rows_stride != 0;
  p.seeded = true;
  p.noise_dtype = state;
  const int columns = states + 2 + p.draws;
  p.clamp_mask = clamped ? (2 << states) - 1 : -1;
  for (int k = 0; k < states; ++k) p.state[k] = buffer(state, 3 * n);
  for (int k = 0; k < 2; ++k) p.model_output[k] = buffer(model, 3 * n);
  for (int r = 0; r < outputs; ++r) {
    p.out[r] = buffer(state, 3 * n);
    p.output_mask[r] = ((1 << columns) - 1) & ~(clamped ? 1 << states : 2 << states);
  }
  p.model_input = buffer(model, 6 * n);
  p.model_input_copies = 2;
  p.table_rows = 2;
  p.table_width = kHeader + columns - 1 + outputs * columns;
  const std::vector<float> table(static_cast<size_t>(2 * p.table_width), 0.5f);
  const std::vector<int64_t> rows = {0, 1, 2};  // the last one is outside of the table
  const std::vector<float> guidance = {1.5f};
  p.table = table.data();
  p.rows = rows.data();
  p.rows_stride = rows_stride;
  p.guidance_scale = guidance.data();
  expect(launch_step(p, nullptr) == 0, "step failed");

  p.table_dtype = DType::f64;
  expect(launch_step(p, nullptr) != 0, "a float64 table was accepted");
  p.table_dtype = DType::f32;
  p.state[0].dtype = DType::f64;
  expect(launch_step(p, nullptr) != 0, "a float64 state was accepted");
}

void check_chain(DType dtype, int64_t n, int64_t offset) {
  Buffers buffer{offset, {}};
  const std::vector<float> table(6, 0.5f);
  const std::vector<int64_t> slots = {1, -1, 0};
  ChainParams p{};
  p.batch = 2;
  p.n = n;
  p.steps = 3;
  p.x_start = buffer(dtype, 2 * n);
  p.out = buffer(dtype, 4 * n);
  p.table = table.data();
  p.slots = slots.data();
  expect(launch_chain(p, nullptr) == 0, "chain failed");
}

// Columns and functions of `structure`, of one model output or two.
void check_loss(const LossParams& structure, DType state, DType model, int64_t n, int64_t offset) {
  Buffers buffer{offset, {}};
  LossParams p = structure;
  const int64_t channels = p.learned ? 2 : 1, results = 3;
  p.batch = 3;
  p.n = n;
  p.pieces = n > kPiece ? (n + kPiece - 1) / kPiece : 1;
  p.noise_dtype = state;
  for (int k = 0; k < p.model_outputs; ++k) {
    p.model_output[k] = buffer(model, channels * 3 * n);
    p.grad[k] = buffer(model, channels * 3 * n);
  }
  if (!p.makes) p.x = buffer(state, 3 * n);
  if (p.makes) p.made = buffer(state, 3 * n);
  p.y = buffer(state, 3 * n);
  const std::vector<float> table(2 * kLossColumns, 0.5f), guidance = {1.5f};
  const std::vector<int64_t> rows = {0, 1, 2};  // the last one is outside of the table
  std::vector<float> sums(static_cast<size_t>(3 * results)), results_grad(sums);
  std::vector<float> partials(static_cast<size_t>(3 * results * p.pieces));
  p.table = table.data();
  p.table_rows = 2;
  p.rows = rows.data();
  p.rows_stride = 1;
  p.guidance_scale = guidance.data();
  p.results = sums.data();
  p.partials = partials.data();
  p.results_grad = results_grad.data();
  expect(launch_loss(p, nullptr) == 0, "loss failed");
  expect(launch_loss_grad(p, nullptr) == 0, "loss_grad failed");

  p.y.dtype = DType::f64;
  expect(launch_loss(p, nullptr) != 0, "a float64 x_t was accepted");
  expect(launch_loss_grad(p, nullptr) != 0, "a float64 x_t was accepted");
}

void check_losses(DType state, DType model, int64_t n, int64_t offset) {
  LossParams p{};
  p.model_outputs = 1;
  p.terms = kErrorTerm;
  p.clamp = -1;
  p.error = 0b00101;
  check_loss(p, state, model, n, offset);
  p.seeded = true;
  p.error = 0b10101;
  check_loss(p, state, model, n, offset);
  p.terms |= kBoundTerm;
  p.error = 0b10100;
  p.bound = 0b0111;
  p.learned = p.frozen = true;
  check_loss(p, state, model, n, offset);
  p.bound = 0b1001;
  p.clamp = 3;
  check_loss(p, state, model, n, offset);
  p.terms |= kXStartTerm;
  p.model_outputs = 2;
  p.rho = kPseudoHuber;
  p.makes = true;
  check_loss(p, state, model, n, offset);
}

// Draws with and without logits, the bound of either model and its gradient.
void check_bits(DType bits, DType model, int64_t n, int64_t offset) {
  Buffers buffer{offset, {}};
  const std::vector<float> table(2 * kBitsColumns, 0.5f), gradients(3, 1.0f);
  const std::vector<int64_t> rows = {0, 1, 2};  // the last one is outside of the table
  const auto share = [&](auto& p) {
    p.batch = 3;
    p.n = n;
    p.table = table.data();
    p.table_rows = 2;
    p.rows = rows.data();
    p.rows_stride = 1;
  };
  BitsParams p{};
  share(p);
  p.x = buffer(bits, 3 * n);
  p.out = buffer(bits, 3 * n);
  p.table_width = 2;
  expect(launch_bits(p, nullptr) == 0, "bits failed");
  p.logits = buffer(model, 3 * n);
  p.table_width = 4;
  expect(launch_bits(p, nullptr) == 0, "bits of logits failed");
  p.logits.dtype = DType::f64;
  expect(launch_bits(p, nullptr) != 0, "float64 logits were accepted");

  BitsBoundParams bound{};
  share(bound);
  bound.table_width = kBitsColumns;
  bound.logits = buffer(model, 3 * n);
  bound.gradient = buffer(model, 3 * n);
  bound.x_t = buffer(bits, 3 * n);
  bound.x_start = buffer(bits, 3 * n);
  for (int64_t count = n; count > 1 || bound.partial_stride == 0;) {
    count = (count + 31) / 32;
    bound.partial_stride += count;
  }
  std::vector<float> results(3), partials(static_cast<size_t>(3 * bound.partial_stride));
  bound.results = results.data();
  bound.partials = partials.data();
  bound.gradients = gradients.data();
  for (const bool mixture : {false, true}) {
    bound.mixture = mixture;
    expect(launch_bits_bound(bound, nullptr) == 0, "bits_bound failed");
    expect(launch_bits_bound_grad(bound, nullptr) == 0, "bits_bound_grad failed");
  }
  bound.logits.dtype = DType::f64;
  expect(launch_bits_bound(bound, nullptr) != 0, "float64 logits were accepted");
  expect(launch_bits_bound_grad(bound, nullptr) != 0, "float64 logits were accepted");
}

}  // namespace

int main() {
  for (const int64_t n : kSizes) {
    for (const int64_t offset : {0, 1}) {
      for (const DType state : kTypes) {
        check_randn(state, n, offset);
        check_chain(state, n, offset);
        check_bits(state, state, n, offset);
        check_bits(DType::u8, state, n, offset);
        for (const DType model : kTypes) {
          if (n < 9000 && (state == DType::f32 || state == model)) {
            check_losses(state, model, n, offset);
          }
          for (const int64_t rows_stride : {0, 1}) {
            check_step(state, model, n, offset, 1, 1, false, rows_stride);
            check_step(state, model, n, offset, 1, 1, true, rows_stride);
            check_step(state, model, n, offset, 2, 3, true, rows_stride);
          }
        }
      }
    }
  }
  return failures != 0;
}
