// Tensors that kernels read block by block: in place, or what does not fill a group of registers
// from a padded copy.
#pragma once

#include "randn.h"

namespace fastdiff::FASTDIFF_ISA {

// Whether to store a tensor past the caches, in which it would not stay: of so many samples of so
// many bytes, each of which begins where a register can be stored so.
inline bool beyond_caches(const void* data, int64_t samples, int64_t sample_bytes) {
  return data && samples * sample_bytes >= streamed_bytes() &&
         reinterpret_cast<uintptr_t>(data) % kRegisterBytes == 0 &&
         sample_bytes % kRegisterBytes == 0;
}

// Memory for one group of any element type.
template <class T>
struct alignas(64) Tail {
  char bytes[Group<T>::kSize * 8];
};

struct Source {
  const char* data = nullptr;        // element 0 of sample 0; null: made block by block
  int64_t size, sample_size, first;  // bytes of an element; elements between samples, before ours
  Place here{};                      // the current block
  bool used = false;                 // by this sample

  void connect(const Operand& operand, int64_t between_samples, int64_t before) {
    data = static_cast<const char*>(operand.data);
    size = size_of(operand.dtype);
    sample_size = between_samples;
    first = before;
    here.dtype = operand.dtype;
  }

  // Points `here` at elements begin.. of the sample: in memory, or, where there is a `copy` to
  // write to, at that, padded with zeros to a group.
  template <class T>
  void find(int64_t sample, int64_t begin, int64_t count, char* copy, Ahead& ahead) {
    const int64_t element = sample * sample_size + first + begin;
    here.data = const_cast<char*>(data) + element * size;
    if (!copy) return ahead.add(here.data, size);
    const int64_t bytes = count * size, end = Group<T>::kSize * size;
    for (int64_t i = bytes / kRegisterBytes * kRegisterBytes; i < end; i += kRegisterBytes)
      store_vector(copy + i, Lanes::U{});
    memcpy(copy, here.data, static_cast<size_t>(bytes));
    here.data = copy;
  }
};

}  // namespace fastdiff::FASTDIFF_ISA
