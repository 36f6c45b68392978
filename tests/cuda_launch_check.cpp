// Calls the CUDA launchers, compiled for a GPU, where there is none; prints what they return.
#include <cstdio>
#include <vector>

#include "include/bits.h"
#include "include/loss.h"
#include "include/params.h"

using namespace fastdiff;

int main() {
  std::vector<float> memory(64), table(32, 1.0f);
  const std::vector<int64_t> rows = {0}, slots = {0};
  const Operand samples = {memory.data(), DType::f32};
  RandnParams randn{};
  randn.out = samples;
  randn.batch = 0;
  randn.n = 64;
  std::printf("%d\n", launch_randn(randn, nullptr));
  randn.batch = 1;
  std::printf("%d\n", launch_randn(randn, nullptr));

  StepParams step{};
  step.batch = 1;
  step.n = 64;
  step.states = step.outputs = 1;
  step.clamp_mask = -1;
  step.output_mask[0] = 1;
  step.state[0] = step.out[0] = samples;
  step.table = table.data();
  step.table_rows = 1;
  step.table_width = kHeader + 3;
  step.rows = rows.data();
  std::printf("%d\n", launch_step(step, nullptr));

  ChainParams chain{};
  chain.batch = chain.steps = 1;
  chain.n = 64;
  chain.x_start = chain.out = samples;
  chain.table = table.data();
  chain.slots = slots.data();
  std::printf("%d\n", launch_chain(chain, nullptr));

  LossParams loss{};
  loss.batch = loss.model_outputs = loss.pieces = 1;
  loss.n = 64;
  loss.terms = kErrorTerm;
  loss.error = 0b10100;  // of the model output and the noise
  loss.clamp = -1;
  loss.seeded = true;
  loss.model_output[0] = loss.grad[0] = samples;
  loss.table = table.data();
  loss.table_rows = 1;
  loss.rows = rows.data();
  loss.results = loss.partials = memory.data();
  loss.results_grad = memory.data();
  std::printf("%d\n", launch_loss(loss, nullptr));
  std::printf("%d\n", launch_loss_grad(loss, nullptr));

  BitsParams bits{};
  bits.batch = 1;
  bits.n = 64;
  bits.x = bits.out = samples;
  bits.table = table.data();
  bits.table_rows = 1;
  bits.table_width = 2;
  bits.rows = rows.data();
  std::printf("%d\n", launch_bits(bits, nullptr));

  BitsBoundParams bound{};
  bound.batch = 1;
  bound.n = 64;
  bound.partial_stride = 3;
  bound.logits = bound.x_t = bound.x_start = bound.gradient = samples;
  bound.table = table.data();
  bound.table_rows = 1;
  bound.table_width = kBitsColumns;
  bound.rows = rows.data();
  bound.results = bound.partials = memory.data();
  bound.gradients = memory.data();
  std::printf("%d\n", launch_bits_bound(bound, nullptr));
  std::printf("%d\n", launch_bits_bound_grad(bound, nullptr));
}
