// noise="fast" with the special function unit modelled at its documented error (csrc/cuda/host.h)
// against the exact normals. Prints the largest difference, and the share of normals that are more
// than 2e-5 off when every error has its largest size.
#include "cuda/host.h"

#include <algorithm>
#include <cstdio>
#include <vector>

#include "cuda/randn.cuh"

namespace {

using fastdiff::Scalar;

double worst = 0.0;
long far = 0, normals = 0;

void compare(uint32_t a, uint32_t b) {
  float exact[2], fast[2];
  fastdiff::box_muller<Scalar>(a, b, exact[0], exact[1]);
  fastdiff::box_muller_fast(a, b, fast[0], fast[1]);
  for (int k = 0; k < 2; ++k) {
    const double difference = std::fabs(static_cast<double>(fast[k]) - exact[k]);
    worst = difference <= worst ? worst : difference;  // NaN stays
    far += !(difference <= 2e-5);
    ++normals;
  }
}

// Every sign of every error: the result is monotonic in each, so between them nothing is worse.
void compare_with_errors(uint32_t a, uint32_t b) {
  for (int signs = 0; signs < 16; ++signs) {
    const auto sign = [&](int bit) { return signs >> bit & 1 ? 1.0 : -1.0; };
    fd_errors = {sign(0), sign(1), sign(2), sign(3)};
    compare(a, b);
  }
}

// What differs by little from a power of two, or from an odd multiple of an eighth of a turn.
std::vector<uint32_t> edges(uint32_t width) {
  std::vector<uint32_t> words;
  for (uint32_t power = 0; power < 32; ++power) {
    for (uint32_t near = 0; near < width; ++near) {
      words.push_back((1u << power) + near);
      words.push_back((1u << power) - near);
      words.push_back(0u - (1u << power) - near);
    }
  }
  return words;
}

}  // namespace

int main() {
  const std::vector<uint32_t> angles = edges(2);
  for (const uint32_t a : edges(64)) {
    for (const uint32_t b : angles) compare_with_errors(a, b);
  }
  for (uint32_t near = 0; near < 4096; ++near)
    compare_with_errors(0u - 1u - near, near * 0x9e3779b9u);
  far = normals = 0;
  for (uint32_t block = 0; block < 200000; ++block) {
    uint32_t words[4] = {block, 0, 0, 2};
    fastdiff::philox4x32<Scalar>(words, 7, 0);
    compare_with_errors(words[0], words[1]);
    compare_with_errors(words[2], words[3]);
  }
  std::printf("%.9g %.9g\n", worst, static_cast<double>(far) / static_cast<double>(normals));
}
