// What the operations on losses take, by fastdiff/ops/loss.py.
#pragma once

#include "../include/loss.h"
#include "tensors.h"

namespace {

// What `loss` and `loss_grad` share: LossSpec.layout() of fastdiff/ops/loss.py and all inputs but
// the gradients.
fastdiff::LossParams loss_params(const std::string& layout, Tensors& read) {
  using namespace fastdiff;
  LossParams p{};
  Layout facts(layout);
  p.model_outputs = facts.field(1);
  const int32_t noise = facts.field(1), optional = facts.field(1);
  p.terms = facts.field(1);
  p.error = facts.field(2);
  p.bound = facts.field(1);
  p.clamp = facts.digit_if_any();
  p.rho = facts.field(1);
  p.noise_dtype = static_cast<DType>(facts.field(1) & 3);
  const int32_t flags = facts.field(1);
  p.density = (flags & 1) != 0;
  p.learned = (flags & 2) != 0;
  p.frozen = (flags & 4) != 0;
  p.makes = (flags & 8) != 0;
  const int32_t others = facts.field(1);
  p.fast = (others & 1) != 0;
  p.keeps_slopes = (others & 2) != 0;
  STD_TORCH_CHECK(facts.ends() && others < 4, "layout must be a string of LossSpec.layout");
  STD_TORCH_CHECK(p.model_outputs == 1 || p.model_outputs == 2, "1 or 2 model outputs, not ",
                  p.model_outputs);
  STD_TORCH_CHECK(p.terms > 0 && p.terms < 8 && p.error < 32 && p.bound < 16 && p.clamp < 4 &&
                      p.rho <= kPseudoHuber,
                  "layout has a term, column or function that there is not");
  const bool error = p.terms & kErrorTerm, bound = p.terms & kBoundTerm,
             x_start = p.terms & kXStartTerm;
  STD_TORCH_CHECK(
      (!error || p.error) && (!bound || p.bound) && (!p.makes || p.bound & ~1) && p.clamp != 0,
      "layout has a sum of no columns");
  const bool reads_c = (error && p.error & 8) || ((bound || p.makes) && p.bound & 8) || x_start;
  STD_TORCH_CHECK(!reads_c || p.clamp > 0, "layout uses a clamp node that it does not have");
  const bool draws = p.error & 16 || p.makes;
  STD_TORCH_CHECK(noise == 0 || (noise == 1 && draws), "expected ", draws ? "at most 1" : "no",
                  " noise tensor, not ", noise);
  const bool reads_x = !p.makes && (p.error & 1 || p.bound & 1 || x_start);
  STD_TORCH_CHECK(!bound || p.density || reads_x || p.makes, "layout has a likelihood without x");
  const bool lone = p.terms == kErrorTerm && p.model_outputs == 1 && p.clamp < 0;
  STD_TORCH_CHECK(!p.keeps_slopes || (lone && !p.learned && !p.makes),
                  "slopes are kept of a lone error of one model output, without a clamp node");

  const Tensor& first = read.take("model outputs");
  const int64_t size = first.numel(), elements = p.learned ? size / 2 : size;
  p.batch = first.size(0);
  p.n = p.batch ? elements / p.batch : 0;
  STD_TORCH_CHECK(p.batch * p.n * (p.learned ? 2 : 1) == size,
                  "model outputs must have twice the channels where the variance is learned");
  p.model_output[0] = operand(first);
  read.fill(p.model_output + 1, p.model_outputs - 1, size, "model outputs");
  if (reads_x) p.x = operand(read.take("x", elements));
  if (p.error & 2 || p.bound & 2 || (p.clamp > 0 && p.clamp & 1))
    p.y = operand(read.take("y", elements));
  read.fill(&p.noise, noise, elements, "noise tensors");
  p.seeded = draws && noise == 0;
  const Tensor& table = read.take("table");
  p.table = table.data_ptr();
  p.table_dtype = dtype_of(table);
  p.table_rows = table.size(0);
  STD_TORCH_CHECK(p.table_dtype == DType::f32 || p.table_dtype == DType::f64,
                  "table must be float32 or float64");
  STD_TORCH_CHECK(table.numel() == p.table_rows * kLossColumns, "table must have ",
                  static_cast<int64_t>(kLossColumns), " columns");
  STD_TORCH_CHECK(p.table_rows > 0, "table must have a row");
  p.rows = read.take_per_sample<int64_t>("rows", ScalarType::Long, p.batch, &p.rows_stride);
  if (optional & 1)
    p.keys = pointer<int64_t>(read.take("keys", 2 * p.batch), ScalarType::Long, "keys");
  if (optional & 2)
    p.guidance_scale = read.take_per_sample<float>("guidance_scale", ScalarType::Float, p.batch,
                                                   &p.guidance_stride);
  STD_TORCH_CHECK(p.model_outputs < 2 || p.guidance_scale, "two model outputs need guidance_scale");
  return p;
}

// A tensor of the arithmetic, of one entry per result, or as many as said.
void* take_results(Tensors& tensors, const char* name, const fastdiff::LossParams& p,
                   int64_t entries = 1) {
  const int64_t terms = (p.terms & 1) + (p.terms >> 1 & 1) + (p.terms >> 2 & 1);
  const Tensor& tensor = tensors.take(name, terms * p.batch * entries);
  STD_TORCH_CHECK(dtype_of(tensor) == p.table_dtype, name, " must have the dtype of the table");
  return tensor.data_ptr();
}

}  // namespace
