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

// (B,) steps by 1 through the batch, (1,) stays.
int64_t batch_stride(const Tensor& tensor) { return tensor.numel() > 1 ? 1 : 0; }

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
void launch(int (*launcher)(const Params&, void*), const Params& params, const Tensor& where) {
  if (params.batch == 0 || params.n == 0) return;
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

// Kernels see no sizes: a short operand would be read past its end.
void fill(const std::vector<Tensor>& tensors, Operand* operands, int limit, int64_t elements,
          const char* name) {
  STD_TORCH_CHECK(tensors.size() <= static_cast<size_t>(limit), "at most ", limit, " ", name,
                  ", not ", tensors.size());
  for (size_t k = 0; k < tensors.size(); ++k) {
    STD_TORCH_CHECK(tensors[k].numel() == elements, name, " must have ", elements,
                    " elements each, not ", tensors[k].numel());
    operands[k] = operand(tensors[k]);
  }
}

void step(std::vector<Tensor> states, std::vector<Tensor> model_outputs, std::vector<Tensor> noise,
          Tensor table, Tensor rows, std::optional<Tensor> keys, std::optional<Tensor> draws,
          std::optional<Tensor> guidance_scale, std::optional<Tensor> threshold,
          std::vector<int64_t> spec, std::vector<int64_t> counter, std::vector<Tensor> out,
          std::optional<Tensor> model_input) {
  using namespace fastdiff;
  constexpr size_t kSpecHead = 5;  // draws, noise dtype, learned, fast, clamp mask; then the rows
  STD_TORCH_CHECK(spec.size() == kSpecHead + out.size() && counter.size() == 4 && !out.empty(),
                  "spec and counter must have the form of StepSpec.encoded");
  StepParams p{};
  const int64_t elements = out[0].numel();
  fill(states, p.state, kMaxStates, elements, "states");
  fill(model_outputs, p.model_output, 2, spec[2] ? 2 * elements : elements, "model outputs");
  fill(noise, p.noise, kMaxDraws, elements, "noise tensors");
  fill(out, p.out, kMaxOutputs, elements, "outputs");
  p.batch = out[0].size(0);
  p.n = p.batch ? elements / p.batch : 0;
  p.states = static_cast<int32_t>(states.size());
  p.model_outputs = static_cast<int32_t>(model_outputs.size());
  p.outputs = static_cast<int32_t>(out.size());
  p.draws = static_cast<int32_t>(spec[0]);
  p.noise_dtype = static_cast<DType>(spec[1]);
  p.learned = spec[2] != 0;
  p.fast = spec[3] != 0;
  p.clamp_mask = static_cast<int32_t>(spec[4]);
  const int32_t no_model = p.model_outputs == 0 ? 1 << p.states : 0;
  const int32_t no_clamp = p.clamp_mask < 0 ? 2 << p.states : 0;
  bool exist = p.clamp_mask < 0 || !(p.clamp_mask & no_model);
  for (int r = 0; r < p.outputs; ++r) {
    p.output_mask[r] = static_cast<int32_t>(spec[kSpecHead + static_cast<size_t>(r)]);
    exist = exist && !(p.output_mask[r] & (no_model | no_clamp));
  }
  STD_TORCH_CHECK(exist, "spec uses a model output or a clamp node that this step does not have");
  p.seeded = noise.empty() && p.draws > 0;
  STD_TORCH_CHECK(p.draws >= 0 && p.draws <= kMaxDraws, "at most ", kMaxDraws, " draws, not ",
                  p.draws);
  STD_TORCH_CHECK(p.seeded || p.draws == static_cast<int64_t>(noise.size()), "expected ", p.draws,
                  " noise tensors, not ", noise.size());
  if (model_input) {
    p.model_input = operand(*model_input);
    p.model_input_copies = elements ? static_cast<int32_t>(model_input->numel() / elements) : 0;
    STD_TORCH_CHECK(p.model_input_copies <= 2, "model_input must hold the batch once or twice");
  }
  p.table = table.data_ptr();
  p.table_dtype = dtype_of(table);
  p.table_rows = table.size(0);
  p.table_width = table.size(1);
  const int64_t columns = p.states + 2 + p.draws;
  STD_TORCH_CHECK(p.table_width == kHeader + columns - 1 + p.outputs * columns, "table has ",
                  p.table_width, " columns, which is not the width of this spec");
  STD_TORCH_CHECK(p.table_rows > 0, "table must have a row");
  p.rows = static_cast<const int64_t*>(rows.data_ptr());
  p.rows_stride = batch_stride(rows);
  p.keys = data<int64_t>(keys);
  p.draw_table = data<int64_t>(draws);
  p.seed = counter[0];
  p.sample_offset = counter[1];
  p.step = counter[2];
  p.stream = counter[3];
  p.guidance_scale = data<float>(guidance_scale);
  p.guidance_stride = guidance_scale ? batch_stride(*guidance_scale) : 0;
  p.threshold = data<float>(threshold);
  p.threshold_stride = threshold ? batch_stride(*threshold) : 0;
  STD_TORCH_CHECK(p.model_outputs < 2 || p.guidance_scale, "two model outputs need guidance_scale");
  STD_TORCH_CHECK(!p.learned || p.model_outputs > 0, "learned variance needs a model output");
  launch(&launch_step, p, out[0]);
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

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTDIFF_NAMESPACE, FASTDIFF_DISPATCH_KEY, m) {
  m.impl("randn", TORCH_BOX(&randn));
  m.impl("step", TORCH_BOX(&step));
  m.impl("chain", TORCH_BOX(&chain));
}
