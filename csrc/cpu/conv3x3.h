// Winograd's F(2 x 2, 3 x 3) (Lavin and Gray 2016): four outputs take 16 products per pair of channels instead of 36. A
// tile of 2 x 2 outputs is A^T (G g G^T * B^T d B) A, where d are its 4 x 4 inputs, g is the 3 x 3 kernel, and * is
// elementwise. The elements of A, B and G are 0, 1, -1 and, in G, 1/2, and there are fewer sums than in a direct
// convolution, so the result is no less exact.
#pragma once

#include "conv.h"
#include "vector.h"

namespace spade {

// Extra elements between two points, so that the points of a tile do not all fall into the same set of a cache.
constexpr int64_t kGap = 16;
constexpr int64_t kLine = 64;

template <class A>
constexpr int kLanes = static_cast<int>(kLine / sizeof(A));

// A vector of `lanes` values, which need not be aligned.
template <class A, int lanes>
struct Lanes {
  typedef A Vector __attribute__((vector_size(lanes * sizeof(A)), aligned(sizeof(A)), may_alias));
  static SPADE_INLINE const Vector& at(const A* values) {
    return *reinterpret_cast<const Vector*>(values);
  }
  static SPADE_INLINE Vector& at(A* values) {
    return *reinterpret_cast<Vector*>(values);
  }
};

// B^T d B of the 4 x 4 pixels d, for `lanes` channels; results for two points are `point_stride` apart.
template <class A, int lanes>
SPADE_INLINE void transform_input(const A* const d[kPoints], int64_t channel, A* to, int64_t point_stride) {
  using L = Lanes<A, lanes>;
  typename L::Vector half[4][4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const typename L::Vector d0 = L::at(d[j] + channel), d1 = L::at(d[4 + j] + channel);
    const typename L::Vector d2 = L::at(d[8 + j] + channel), d3 = L::at(d[12 + j] + channel);
    half[0][j] = d0 - d2;
    half[1][j] = d1 + d2;
    half[2][j] = d2 - d1;
    half[3][j] = d1 - d3;
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i, to += 4 * point_stride) {
    const auto* h = half[i];
    L::at(to) = h[0] - h[2];
    L::at(to + point_stride) = h[1] + h[2];
    L::at(to + 2 * point_stride) = h[2] - h[1];
    L::at(to + 3 * point_stride) = h[1] - h[3];
  }
}

}  // namespace spade
