// Launchers (csrc/include/params.h) of the operations on bits.
#include "bits.cuh"
#include "launch.cuh"

namespace fastdiff {

namespace {

// 0, or why the kernels do not serve these tensors.
int refusal(const BitsBoundParams& p) {
  if (p.table_dtype != DType::f32 || is_f64(p.logits) || is_f64(p.x_t) || is_f64(p.x_start) ||
      is_f64(p.gradient)) {
    return cudaErrorNotSupported;
  }
  return fits(p.batch, p.n) ? cudaSuccess : cudaErrorInvalidValue;
}

bool is_aligned(const BitsBoundParams& p) {
  return is_aligned(p.logits, p.n, false) && is_aligned(p.x_t, p.n, false) &&
         is_aligned(p.x_start, p.n, false) && is_aligned(p.gradient, p.n, false);
}

}  // namespace

int launch_bits(const BitsParams& p, void* stream) {
  if (p.batch == 0 || p.n == 0) return cudaSuccess;
  if (p.table_dtype != DType::f32 || is_f64(p.logits) || is_f64(p.x) || is_f64(p.out)) {
    return cudaErrorNotSupported;
  }
  if (!fits(p.batch, p.n)) return cudaErrorInvalidValue;
  const bool aligned = is_aligned(p.logits, p.n, false) && is_aligned(p.x, p.n, false) &&
                       is_aligned(p.out, p.n, false);
  const Grid grid = make_grid(p.batch, p.n, 8);
  if (p.logits.data) {
    FD_LAUNCH(bits_kernel<true>, grid, stream, p, aligned);
  } else {
    FD_LAUNCH(bits_kernel<false>, grid, stream, p, aligned);
  }
  return cudaGetLastError();
}

int launch_bits_bound(const BitsBoundParams& p, void* stream) {
  if (p.batch == 0 || p.n == 0) return cudaSuccess;
  if (const int error = refusal(p)) return error;
  Grid grid = make_grid(p.batch, p.n, kLeaf);
  if (p.mixture) {
    FD_LAUNCH(bits_bound_kernel<true>, grid, stream, p, is_aligned(p));
  } else {
    FD_LAUNCH(bits_bound_kernel<false>, grid, stream, p, is_aligned(p));
  }
  int64_t first = 0;
  for (int64_t count = ceil_div(p.n, kLeaf); count > 1; count = ceil_div(count, kLeaf)) {
    grid = make_grid(p.batch, count, kLeaf);
    FD_LAUNCH(bits_bound_sum_kernel, grid, stream, p, first, count);
    first += count;
  }
  return cudaGetLastError();
}

int launch_bits_bound_grad(const BitsBoundParams& p, void* stream) {
  if (p.batch == 0 || p.n == 0) return cudaSuccess;
  if (const int error = refusal(p)) return error;
  const Grid grid = make_grid(p.batch, p.n, 8);
  if (p.mixture) {
    FD_LAUNCH(bits_bound_grad_kernel<true>, grid, stream, p, is_aligned(p));
  } else {
    FD_LAUNCH(bits_bound_grad_kernel<false>, grid, stream, p, is_aligned(p));
  }
  return cudaGetLastError();
}

}  // namespace fastdiff
