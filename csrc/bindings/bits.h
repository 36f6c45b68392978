// What the operations on bits take, by fastdiff/ops/bits.py.
#pragma once

#include "tensors.h"

namespace {

// Bits may be uint8.
Operand bits_operand(const Tensor& tensor) {
  if (tensor.scalar_type() == ScalarType::Byte) return {tensor.data_ptr(), DType::u8};
  return operand(tensor);
}

// Table and rows of the operations on bits.
template <class P>
void take_table(Tensors& read, int64_t width, P* p) {
  const Tensor& table = read.take("table");
  p->table = table.data_ptr();
  p->table_dtype = dtype_of(table);
  p->table_rows = table.size(0);
  p->table_width = table.size(1);
  STD_TORCH_CHECK(p->table_dtype == DType::f32 || p->table_dtype == DType::f64,
                  "table must be float32 or float64");
  STD_TORCH_CHECK(p->table_rows > 0 && p->table_width == width, "table must have rows of ", width,
                  " columns, not ", p->table_width);
  p->rows = read.take_per_sample<int64_t>("rows", ScalarType::Long, p->batch, &p->rows_stride);
}

// What bits_bound and bits_bound_grad share: everything but the gradients and the outputs.
fastdiff::BitsBoundParams bits_bound_params(const Tensor& logits, const std::string& layout,
                                            Tensors& read) {
  fastdiff::BitsBoundParams p{};
  Layout facts(layout);
  p.mixture = facts.field(1) != 0;
  const int64_t elements = logits.numel();
  p.batch = logits.size(0);
  p.n = p.batch ? elements / p.batch : 0;
  p.logits = operand(logits);
  p.x_t = bits_operand(read.take("x_t", elements));
  p.x_start = bits_operand(read.take("x_start", elements));
  take_table(read, 13, &p);
  return p;
}

const void* per_sample(const Tensor& tensor, const char* name, const fastdiff::BitsBoundParams& p) {
  STD_TORCH_CHECK(tensor.numel() == p.batch && dtype_of(tensor) == p.table_dtype, name,
                  " must have one entry per sample, of the table's dtype");
  return tensor.data_ptr();
}

}  // namespace
