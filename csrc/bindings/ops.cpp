// The operations of fastdiff/ops/schemas.py for one device: tensors to the plain structs of
// params.h. Compiled per library with
//   FASTDIFF_NAMESPACE, FASTDIFF_DISPATCH_KEY   where the operations are registered
//   FASTDIFF_CUDA                               the tensors are on a GPU
// fastdiff/ops has checked the arguments; what is checked here protects memory.
#include "bits.h"
#include "loss.h"
#include "tensors.h"

namespace {

void randn(Tensor out, std::optional<Tensor> keys, int64_t seed, int64_t sample_offset,
           int64_t step, int64_t stream, int64_t first_block, bool fast) {
  fastdiff::RandnParams p{};
  p.out = operand(out);
  p.batch = out.size(0);
  p.n = p.batch ? out.numel() / p.batch : 0;
  p.keys = data<int64_t>(keys);
  set_counter(p, seed, sample_offset, step, stream);
  p.first_block = first_block;
  p.fast = fast;
  launch(&fastdiff::launch_randn, p, out);
}

void at_most(int32_t limit, int32_t count, const char* name) {
  STD_TORCH_CHECK(count <= limit, "at most ", limit, " ", name, ", not ", count);
}

void step(std::vector<Tensor> inputs, std::vector<Tensor> outputs, std::string layout, int64_t seed,
          int64_t sample_offset, int64_t step, int64_t stream) {
  using namespace fastdiff;
  StepParams p{};
  Layout facts(layout);
  p.model_outputs = facts.field(1);
  const int32_t noise = facts.field(1);
  const int32_t optional = facts.field(1);
  p.states = facts.field(1);
  p.draws = facts.field(1);
  const int32_t kind = facts.field(1);
  p.noise_dtype = static_cast<DType>(kind & 3);
  p.learned = (kind & 4) != 0;
  p.fast = (kind & 8) != 0;
  p.clamp_mask = facts.mask_if_any();
  at_most(2, p.model_outputs, "model outputs");
  at_most(kMaxStates, p.states, "states");
  at_most(kMaxDraws, p.draws, "draws");
  const int32_t no_model = p.model_outputs == 0 ? 1 << p.states : 0;
  const int32_t no_clamp = p.clamp_mask < 0 ? 2 << p.states : 0;
  // A column that there is not would be a coefficient past the end of its row.
  const int32_t beyond = ~((1 << (p.states + 2 + p.draws)) - 1);
  bool exist = p.clamp_mask < 0 || !(p.clamp_mask & (no_model | beyond >> 1));
  while (!facts.ends()) {
    at_most(kMaxOutputs, p.outputs + 1, "outputs");
    const int32_t mask = facts.mask();
    exist = exist && !(mask & (no_model | no_clamp | beyond));
    p.output_mask[p.outputs++] = mask;
  }
  STD_TORCH_CHECK(exist, "layout uses a model output, clamp node or draw that this step does not ",
                  "have");
  STD_TORCH_CHECK(p.outputs > 0, "layout must have an output");
  p.seeded = noise == 0 && p.draws > 0;
  STD_TORCH_CHECK(p.seeded || p.draws == noise, "expected ", p.draws, " noise tensors, not ",
                  noise);

  Tensors written(outputs);
  const Tensor& first = written.take("outputs");
  const int64_t elements = first.numel();
  p.out[0] = operand(first);
  written.fill(p.out + 1, p.outputs - 1, elements, "outputs");
  p.batch = first.size(0);
  p.n = p.batch ? elements / p.batch : 0;
  if (!written.all_taken()) {
    const Tensor& model_input = written.take("model input");
    p.model_input = operand(model_input);
    p.model_input_copies = elements ? static_cast<int32_t>(model_input.numel() / elements) : 0;
    STD_TORCH_CHECK(p.model_input_copies <= 2, "model_input must hold the batch once or twice");
  }

  Tensors read(inputs);
  read.fill(p.state, p.states, elements, "states");
  read.fill(p.model_output, p.model_outputs, p.learned ? 2 * elements : elements, "model outputs");
  read.fill(p.noise, noise, elements, "noise tensors");
  const Tensor& table = read.take("table");
  p.table = table.data_ptr();
  p.table_dtype = dtype_of(table);
  p.table_rows = table.size(0);
  p.table_width = table.size(1);
  const int64_t columns = p.states + 2 + p.draws;
  STD_TORCH_CHECK(p.table_width == kHeader + columns - 1 + p.outputs * columns, "table has ",
                  p.table_width, " columns, which is not the width of this layout");
  STD_TORCH_CHECK(p.table_rows > 0, "table must have a row");
  p.rows = read.take_per_sample<int64_t>("rows", ScalarType::Long, p.batch, &p.rows_stride);
  if (optional & 1) {
    p.keys = pointer<int64_t>(read.take("keys", 2 * p.batch), ScalarType::Long, "keys");
  }
  if (optional & 2) {
    const Tensor& draws = read.take("draws", 2 * p.table_rows * p.draws);
    p.draw_table = pointer<int64_t>(draws, ScalarType::Long, "draws");
  }
  if (optional & 4) {
    p.guidance_scale = read.take_per_sample<float>("guidance_scale", ScalarType::Float, p.batch,
                                                   &p.guidance_stride);
  }
  if (optional & 8) {
    p.threshold =
        read.take_per_sample<float>("threshold", ScalarType::Float, p.batch, &p.threshold_stride);
  }
  STD_TORCH_CHECK(read.all_taken() && written.all_taken(),
                  "there are more tensors than layout names");
  STD_TORCH_CHECK(p.model_outputs < 2 || p.guidance_scale, "two model outputs need guidance_scale");
  STD_TORCH_CHECK(!p.learned || p.model_outputs > 0, "learned variance needs a model output");
  set_counter(p, seed, sample_offset, step, stream);
  launch(&launch_step, p, first);
}

void loss(std::vector<Tensor> inputs, std::vector<Tensor> outputs, std::string layout, int64_t seed,
          int64_t sample_offset, int64_t step, int64_t stream) {
  Tensors read(inputs), written(outputs);
  fastdiff::LossParams p = loss_params(layout, read);
  p.pieces = p.n > fastdiff::kPiece ? (p.n + fastdiff::kPiece - 1) / fastdiff::kPiece : 1;
  p.results = take_results(written, "results", p);
  p.partials = take_results(written, "partial sums", p, p.pieces);
  if (p.makes) p.made = operand(written.take("x", p.batch * p.n));
  if (p.keeps_slopes) p.slopes = take_results(written, "slopes", p, p.n);
  STD_TORCH_CHECK(read.all_taken() && written.all_taken(),
                  "there are more tensors than layout names");
  set_counter(p, seed, sample_offset, step, stream);
  launch_batch(&fastdiff::launch_loss, p, inputs[0]);  // samples of no elements have a loss too
}

void loss_grad(std::vector<Tensor> inputs, std::vector<Tensor> outputs, std::string layout,
               int64_t seed, int64_t sample_offset, int64_t step, int64_t stream) {
  Tensors read(inputs), written(outputs);
  fastdiff::LossParams p = loss_params(layout, read);
  p.results_grad = take_results(read, "gradients", p);
  written.fill(p.grad, p.model_outputs, p.batch * p.n * (p.learned ? 2 : 1), "outputs");
  STD_TORCH_CHECK(read.all_taken() && written.all_taken(),
                  "there are more tensors than layout names");
  set_counter(p, seed, sample_offset, step, stream);
  launch(&fastdiff::launch_loss_grad, p, inputs[0]);
}

void chain(Tensor x_start, std::optional<Tensor> noise, Tensor table, Tensor slots,
           std::optional<Tensor> keys, int64_t seed, int64_t sample_offset, bool fast, Tensor out) {
  fastdiff::ChainParams p{};
  p.batch = x_start.size(0);
  p.n = p.batch ? x_start.numel() / p.batch : 0;
  p.steps = table.size(0);
  p.x_start = operand(x_start);
  if (noise) p.noise = operand(*noise);
  p.out = operand(out);
  p.table = table.data_ptr();
  p.table_dtype = dtype_of(table);
  p.slots = static_cast<const int64_t*>(slots.data_ptr());
  p.keys = data<int64_t>(keys);
  p.seed = seed;
  p.sample_offset = sample_offset;
  p.fast = fast;
  launch(&fastdiff::launch_chain, p, x_start);
}

void bits(std::vector<Tensor> inputs, std::vector<Tensor> outputs, std::string layout, int64_t seed,
          int64_t sample_offset, int64_t step, int64_t stream) {
  fastdiff::BitsParams p{};
  Layout facts(layout);
  const bool logits = facts.field(1) != 0, x = facts.field(1) != 0, keys = facts.field(1) != 0;
  Tensors written(outputs), read(inputs);
  const Tensor& out = written.take("outputs");
  const int64_t elements = out.numel();
  p.out = bits_operand(out);
  p.batch = out.size(0);
  p.n = p.batch ? elements / p.batch : 0;
  if (logits) p.logits = operand(read.take("logits", elements));
  if (x) p.x = bits_operand(read.take("x", elements));
  take_table(read, logits ? 4 : 2, &p);
  if (keys) p.keys = pointer<int64_t>(read.take("keys", 2 * p.batch), ScalarType::Long, "keys");
  STD_TORCH_CHECK(read.all_taken() && written.all_taken() && facts.ends(),
                  "there are more tensors than layout names");
  set_counter(p, seed, sample_offset, step, stream);
  launch(&fastdiff::launch_bits, p, out);
}

void bits_bound(std::vector<Tensor> inputs, std::vector<Tensor> outputs, std::string layout,
                int64_t, int64_t, int64_t, int64_t) {
  Tensors written(outputs), read(inputs);
  const Tensor& logits = read.take("logits");
  fastdiff::BitsBoundParams p = bits_bound_params(logits, layout, read);
  p.results = const_cast<void*>(per_sample(written.take("outputs"), "results", p));
  const Tensor& partials = written.take("partial sums");
  int64_t least = 0;
  for (int64_t parts = (p.n + 31) / 32;; parts = (parts + 31) / 32) {
    least += parts;
    if (parts <= 1) break;
  }
  p.partials = partials.data_ptr();
  p.partial_stride = p.batch ? partials.numel() / p.batch : 0;
  STD_TORCH_CHECK(p.partial_stride >= least && dtype_of(partials) == p.table_dtype,
                  "partial sums need ", least, " entries per sample, of the table's dtype");
  STD_TORCH_CHECK(read.all_taken() && written.all_taken(),
                  "there are more tensors than layout names");
  launch(&fastdiff::launch_bits_bound, p, logits);
}

void bits_bound_grad(std::vector<Tensor> inputs, std::vector<Tensor> outputs, std::string layout,
                     int64_t, int64_t, int64_t, int64_t) {
  Tensors written(outputs), read(inputs);
  const Tensor& logits = read.take("logits");
  fastdiff::BitsBoundParams p = bits_bound_params(logits, layout, read);
  p.gradients = per_sample(read.take("gradients"), "gradients", p);
  p.gradient = operand(written.take("outputs", logits.numel()));
  STD_TORCH_CHECK(read.all_taken() && written.all_taken(),
                  "there are more tensors than layout names");
  launch(&fastdiff::launch_bits_bound_grad, p, logits);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTDIFF_NAMESPACE, FASTDIFF_DISPATCH_KEY, m) {
  m.impl("randn", TORCH_BOX(&randn));
  m.impl("step", TORCH_BOX(&step));
  m.impl("chain", TORCH_BOX(&chain));
  m.impl("loss", TORCH_BOX(&loss));
  m.impl("loss_grad", TORCH_BOX(&loss_grad));
  m.impl("bits", TORCH_BOX(&bits));
  m.impl("bits_bound", TORCH_BOX(&bits_bound));
  m.impl("bits_bound_grad", TORCH_BOX(&bits_bound_grad));
}
