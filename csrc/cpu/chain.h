// The forward chain (fastdiff/ops/chain.py): a block of x stays in the cache for all T steps.
#pragma once

#include "randn.h"

namespace fastdiff::FASTDIFF_ISA {

// x = round(a x + b z) of one block; x is held as T, rounded to S.
template <class T, class S>
FD_HD void chain_group(T a, T b, const Place& z, int i, S* x) {
  using V = typename Group<T>::V;
  Group<T> acc, value;
#pragma GCC unroll 8
  for (int u = 0; u < kUnroll; ++u) acc.v[u] = broadcast<V>(static_cast<T>(-0.0));
  if (a != 0) {
    load_group(x + i, value);
#pragma GCC unroll 8
    for (int u = 0; u < kUnroll; ++u) acc.v[u] += a * value.v[u];
  }
  if (b != 0) {
    load_group(z, i, value);
#pragma GCC unroll 8
    for (int u = 0; u < kUnroll; ++u) acc.v[u] += b * value.v[u];
  }
  store_group(x + i, acc);
}

template <class T, class S>
__attribute__((noinline)) void chain_blocks(const ChainParams& p, int64_t first, int64_t last) {
  constexpr int64_t kStreamChain = 4;  // fastdiff/noise.py STREAM_CHAIN
  constexpr int kGroup = Group<T>::kSize;
  alignas(64) S x[kBlock];
  alignas(64) char z[kBlock * 8];
  const T* table = static_cast<const T*>(p.table);
  const int64_t per_sample = blocks_per_sample(p.n);
  const auto bytes = [](int64_t elements) { return static_cast<size_t>(elements) * sizeof(S); };
  for (int64_t block = first; block < last; ++block) {
    const int64_t b = block / per_sample, begin = block % per_sample * kBlock;
    const int count = static_cast<int>(p.n - begin < kBlock ? p.n - begin : kBlock);
    const int padded = (count + kGroup - 1) / kGroup * kGroup;
    const int64_t element = b * p.n + begin;
    const NoiseKey key = noise_key(p.keys, p.seed, p.sample_offset, b);
    memcpy(x, static_cast<const S*>(p.x_start.data) + element, bytes(count));
    memset(x + count, 0, bytes(padded - count));
    for (int64_t t = 0; t < p.steps; ++t) {
      const T a = table[2 * t], scale = table[2 * t + 1];
      Place noise{z, noise_storage(p.out.dtype)};
      if (!p.noise.data && scale != 0) {
        const Draw draw{key, static_cast<uint32_t>(t), static_cast<uint32_t>(kStreamChain)};
        fill_noise(p.out.dtype, draw, static_cast<uint32_t>(begin / 4), z, padded);
      } else if (p.noise.data) {
        const int64_t size = size_of(p.noise.dtype);
        noise = {static_cast<char*>(p.noise.data) + (t * p.batch * p.n + element) * size,
                 p.noise.dtype};
        if (padded != count) {
          memcpy(z, noise.data, static_cast<size_t>(count * size));
          memset(z + count * size, 0, static_cast<size_t>((padded - count) * size));
          noise.data = z;
        }
      }
      for (int i = 0; i < padded; i += kGroup) chain_group(a, scale, noise, i, x);
      if (p.slots[t] >= 0)
        memcpy(static_cast<S*>(p.out.data) + p.slots[t] * p.batch * p.n + element, x, bytes(count));
    }
  }
}

template <class T>
void chain_as(const ChainParams& p, int64_t first, int64_t last) {
  switch (p.out.dtype) {
    case DType::f32:
      return chain_blocks<T, float>(p, first, last);
    case DType::bf16:
      return chain_blocks<T, bf16_t>(p, first, last);
    case DType::f16:
      return chain_blocks<T, f16_t>(p, first, last);
    case DType::f64:
      return chain_blocks<T, double>(p, first, last);
    case DType::u8:  // of bits alone
      return;
  }
}

inline void chain(const ChainParams& p, int64_t first, int64_t last) {
  if (p.table_dtype == DType::f64)
    chain_as<double>(p, first, last);
  else
    chain_as<float>(p, first, last);
}

}  // namespace fastdiff::FASTDIFF_ISA
