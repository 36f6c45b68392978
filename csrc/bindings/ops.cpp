// The operations of fastdiff/ops/schemas.py for one device: tensors to the plain structs of
// params.h. Compiled per library with
//   FASTDIFF_NAMESPACE, FASTDIFF_DISPATCH_KEY   where the operations are registered
//   FASTDIFF_CUDA                               the tensors are on a GPU
// fastdiff/ops has checked the arguments; what is checked here protects memory.
#include <optional>
#include <string>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#if defined(FASTDIFF_CUDA)
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#endif

#include "../include/loss.h"
#include "../include/params.h"

namespace {

using fastdiff::DType;
using fastdiff::Operand;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    case ScalarType::Double:
      return DType::f64;
    default:
      STD_TORCH_CHECK(false, "dtype must be float32, bfloat16, float16 or float64");
  }
}

Operand operand(const Tensor& tensor) { return {tensor.data_ptr(), dtype_of(tensor)}; }

template <class T>
const T* data(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const T*>(tensor->data_ptr()) : nullptr;
}

#if defined(FASTDIFF_CUDA)
// What went wrong with a launch, and what to do about it.
std::string failure(cudaError_t error, int device) {
  std::string text = std::string("the CUDA kernel did not start: ") + cudaGetErrorString(error);
  switch (error) {
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorUnsupportedPtxVersion: {
      int major = 0, minor = 0;
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
      const std::string gpu = std::to_string(major) + "." + std::to_string(minor);
      return text + "; the native library was built for other GPUs than this one: run `fastdiff " +
             "build --cuda-archs \"" + gpu + "\"` and set FASTDIFF_CUDA_ARCHS=\"" + gpu + "\"";
    }
    case cudaErrorInsufficientDriver:
    case cudaErrorSystemDriverMismatch:
      return text + "; the NVIDIA driver is older than the CUDA toolkit of the native library: " +
             "update the driver, or name an older toolkit in CUDA_HOME and run `fastdiff build`";
    case cudaErrorNoDevice:
      return text + "; make a GPU visible (CUDA_VISIBLE_DEVICES), or choose backend=\"reference\"";
    default:
      return text;
  }
}
#endif

// Runs a launcher on the device and current stream of `where`.
template <class Params>
void launch_batch(int (*launcher)(const Params&, void*), const Params& params,
                  const Tensor& where) {
  if (params.batch == 0) return;
#if defined(FASTDIFF_CUDA)
  const auto device = where.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == AOTI_TORCH_SUCCESS,
                  "PyTorch gives no current stream of GPU ", device);
  const int error = launcher(params, stream);
  STD_TORCH_CHECK(error == 0, failure(static_cast<cudaError_t>(error), device));
#else
  (void)where;
  launcher(params, nullptr);
#endif
}

// The same, of what does nothing where there are no elements.
template <class Params>
void launch(int (*launcher)(const Params&, void*), const Params& params, const Tensor& where) {
  if (params.n > 0) launch_batch(launcher, params, where);
}

void randn(Tensor out, std::optional<Tensor> keys, int64_t seed, int64_t sample_offset,
           int64_t step, int64_t stream, int64_t first_block, bool fast) {
  fastdiff::RandnParams p{};
  p.out = operand(out);
  p.batch = out.size(0);
  p.n = p.batch ? out.numel() / p.batch : 0;
  p.keys = data<int64_t>(keys);
  p.seed = seed;
  p.sample_offset = sample_offset;
  p.step = step;
  p.stream = stream;
  p.first_block = first_block;
  p.fast = fast;
  launch(&fastdiff::launch_randn, p, out);
}

// Reads StepSpec.layout() of fastdiff/ops/step.py from left to right.
class Layout {
 public:
  explicit Layout(const std::string& text) : next_(text.data()), end_(next_ + text.size()) {}

  bool ends() const { return next_ == end_; }

  int32_t field(int digits) {
    STD_TORCH_CHECK(end_ - next_ >= digits, kMalformed);
    int32_t value = 0;
    for (; digits > 0; --digits) {
      const char c = *next_++;
      const int digit = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
      STD_TORCH_CHECK(digit >= 0, kMalformed);
      value = value << 4 | digit;
    }
    return value;
  }

  int32_t mask() { return field(4); }

  // A mask, or -1 for "-".
  int32_t mask_if_any() { return there_is_none() ? -1 : mask(); }
  int32_t digit_if_any() { return there_is_none() ? -1 : field(1); }

 private:
  bool there_is_none() {
    if (ends() || *next_ != '-') return false;
    ++next_;
    return true;
  }

  static constexpr const char* kMalformed = "layout must be a string of hexadecimal digits";
  const char *next_, *end_;
};

template <class T>
const T* pointer(const Tensor& tensor, ScalarType type, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == type, name, " is of another dtype than it must be");
  return static_cast<const T*>(tensor.data_ptr());
}

// Takes the tensors of a list in turn. Kernels see no sizes: a short operand would be read past
// its end, so every tensor that is taken has as many elements as it must.
class Tensors {
 public:
  explicit Tensors(const std::vector<Tensor>& tensors) : tensors_(tensors) {}

  const Tensor& take(const char* name) {
    STD_TORCH_CHECK(taken_ < tensors_.size(), "layout names more tensors than there are: no ",
                    name);
    return tensors_[taken_++];
  }

  const Tensor& take(const char* name, int64_t elements) {
    const Tensor& tensor = take(name);
    STD_TORCH_CHECK(tensor.numel() == elements, name, " must have ", elements,
                    " elements each, not ", tensor.numel());
    return tensor;
  }

  // One value, or one for every sample.
  template <class T>
  const T* take_per_sample(const char* name, ScalarType type, int64_t batch, int64_t* stride) {
    const Tensor& tensor = take(name);
    const int64_t count = tensor.numel();
    STD_TORCH_CHECK(count == 1 || count == batch, name, " must have 1 or ", batch,
                    " elements, not ", count);
    *stride = count > 1 ? 1 : 0;
    return pointer<T>(tensor, type, name);
  }

  void fill(Operand* operands, int count, int64_t elements, const char* name) {
    for (int k = 0; k < count; ++k) operands[k] = operand(take(name, elements));
  }

  bool all_taken() const { return taken_ == tensors_.size(); }

 private:
  const std::vector<Tensor>& tensors_;
  size_t taken_ = 0;
};

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
  const int32_t beyond = -1 << (p.states + 2 + p.draws);
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
  p.seed = seed;
  p.sample_offset = sample_offset;
  p.step = step;
  p.stream = stream;
  launch(&launch_step, p, first);
}

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

template <class Params>
void set_counter(Params& p, int64_t seed, int64_t sample_offset, int64_t step, int64_t stream) {
  p.seed = seed;
  p.sample_offset = sample_offset;
  p.step = step;
  p.stream = stream;
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
  p.seed = seed;
  p.sample_offset = sample_offset;
  p.step = step;
  p.stream = stream;
  launch(&fastdiff::launch_bits, p, out);
}

// What the two operations share: everything but the gradients and the outputs.
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
