// Helpers of CPU kernels: instruction sets, types, and work cut into fixed pieces.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <vector>

// A function is compiled once per instruction set, and one version is chosen when the library is loaded.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(SPADE_ONE_TARGET)
#define SPADE_TARGET_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define SPADE_TARGET_CLONES
#endif
#define SPADE_INLINE inline __attribute__((always_inline))

namespace spade {

template <class T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <class T>
using acc_t = typename Accumulator<T>::type;

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Runs body(begin, end) over [0, count) in pieces of `piece`. A piece is never split between threads, so whatever is
// summed within one has the same value on any number of threads.
template <class Body>
void parallel_for_chunks(int64_t count, int64_t piece, const Body& body) {
  const int64_t pieces = ceil_div(count, piece);
  torch::stable::parallel_for(0, pieces, 1, [&](int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p) body(p * piece, std::min((p + 1) * piece, count));
  });
}

}  // namespace spade
