// Calls the CUDA launchers, compiled for a GPU, where there is none; prints what they return.
#include <cstdio>
#include <vector>

#include "include/params.h"

using namespace fastdiff;

int main() {
  std::vector<float> memory(64), table(32, 1.0f);
  const std::vector<int64_t> rows = {0}, slots = {0};
  RandnParams randn{};
  randn.out = {memory.data(), DType::f32};
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
  step.state[0] = step.out[0] = {memory.data(), DType::f32};
  step.table = table.data();
  step.table_rows = 1;
  step.table_width = kHeader + 3;
  step.rows = rows.data();
  std::printf("%d\n", launch_step(step, nullptr));

  ChainParams chain{};
  chain.batch = chain.steps = 1;
  chain.n = 64;
  chain.x_start = chain.out = {memory.data(), DType::f32};
  chain.table = table.data();
  chain.slots = slots.data();
  std::printf("%d\n", launch_chain(chain, nullptr));
}
