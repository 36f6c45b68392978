// Tensors of an operation as kernels take them, and the launch on their device.
#pragma once

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

template <class Params>
void set_counter(Params& p, int64_t seed, int64_t sample_offset, int64_t step, int64_t stream) {
  p.seed = seed;
  p.sample_offset = sample_offset;
  p.step = step;
  p.stream = stream;
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

}  // namespace
