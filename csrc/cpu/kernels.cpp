// One ISA level: compiled with -DFASTDIFF_ISA=<name> and the level's -march.
#include "kernels.h"

#include "bits.h"
#include "chain.h"
#include "loss.h"
#include "loss_grad.h"
#include "randn.h"
#include "step.h"

namespace fastdiff::FASTDIFF_ISA {

static void box_muller_pairs(const uint32_t* a, const uint32_t* b, float* z0, float* z1,
                             int64_t n) {
  constexpr int kCount = Lanes::kCount;
  for (int64_t i = 0; i < n; i += kCount) {
    const size_t bytes = static_cast<size_t>(n - i < kCount ? n - i : kCount) * 4;
    Lanes::U words[2] = {};
    Lanes::F normals[2];
    memcpy(&words[0], a + i, bytes);
    memcpy(&words[1], b + i, bytes);
    box_muller<Lanes>(words[0], words[1], normals[0], normals[1]);
    memcpy(z0 + i, &normals[0], bytes);
    memcpy(z1 + i, &normals[1], bytes);
  }
}

#define FD_STRING_OF(name) #name
#define FD_STRING(name) FD_STRING_OF(name)

extern const Kernels kernels;
const Kernels kernels = {
    FD_STRING(FASTDIFF_ISA), &randn,           &step, &chain,      &loss,
    &loss_results,           &loss_grad,       &bits, &bits_bound, &bits_bound_sum,
    &bits_bound_grad,        &box_muller_pairs};

}  // namespace fastdiff::FASTDIFF_ISA
