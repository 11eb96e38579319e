// Packs a convolution's weights for conv1x1 and conv3x3: panels of output columns, for 3 x 3 at the points G g G^T.
#include "conv3x3.h"
#include "vector.h"

namespace spade {
namespace {

constexpr int64_t kColumns = kPanelColumns;
constexpr int64_t kDepth = 16;  // input channels transposed at a time

// to (4, kColumns) = G @ (a, b, c).
template <class A>
SPADE_INLINE void transform(const A* a, const A* b, const A* c, A* to, int64_t row) {
#pragma GCC ivdep
  for (int64_t i = 0; i < kColumns; ++i) {
    const A outer = (a[i] + c[i]) / 2, inner = b[i] / 2;
    to[i] = a[i];
    to[row + i] = outer + inner;
    to[2 * row + i] = outer - inner;
    to[3 * row + i] = c[i];
  }
}

// Fills the rows [first, last) of a panel, at every point.
template <class A>
SPADE_INLINE void fill_rows(const ConvWeights& w, int64_t panel, int64_t first, int64_t last, A* panels) {
  const int64_t column = panel * kColumns, valid = std::min(kColumns, w.out - column);
  A weights[9][kDepth][kColumns] = {};
  const A* from = static_cast<const A*>(w.weight) + column * w.out_step + first * w.in_step;
  const auto copy = [&](int64_t t, int64_t d, int64_t c) {
    weights[t][d][c] = from[c * w.out_step + d * w.in_step + t * w.tap_step];
  };
  // The innermost loop reads the values that lie side by side.
  if (w.in_step < w.out_step) {
    for (int64_t c = 0; c < valid; ++c)
      for (int64_t t = 0; t < w.num_taps; ++t)
        for (int64_t d = 0; d < last - first; ++d) copy(t, d, c);
  } else {
    for (int64_t d = 0; d < last - first; ++d)
      for (int64_t t = 0; t < w.num_taps; ++t)
        for (int64_t c = 0; c < valid; ++c) copy(t, d, c);
  }
  const int64_t point_stride = ceil_div(w.out, kColumns) * w.in * kColumns;
  for (int64_t d = first; d < last; ++d) {
    A* to = panels + (panel * w.in + d) * kColumns;
    if (w.num_taps == 1) {
      std::copy_n(weights[0][d - first], kColumns, to);
      continue;
    }
    A half[3][4][kColumns];
    for (int64_t i = 0; i < 3; ++i)
      transform(weights[3 * i][d - first], weights[3 * i + 1][d - first], weights[3 * i + 2][d - first], half[i][0],
                kColumns);
    for (int64_t j = 0; j < 4; ++j)
      transform(half[0][j], half[1][j], half[2][j], to + j * point_stride, 4 * point_stride);
  }
}
SPADE_TARGET_CLONES void fill_any(const ConvWeights& w, int64_t panel, int64_t first, int64_t last, float* panels) {
  fill_rows(w, panel, first, last, panels);
}
SPADE_TARGET_CLONES void fill_any(const ConvWeights& w, int64_t panel, int64_t first, int64_t last, double* panels) {
  fill_rows(w, panel, first, last, panels);
}

template <class A>
void panels_of(const ConvWeights& w, A* panels) {
  const int64_t blocks = ceil_div(w.in, kDepth);
  parallel_for_chunks(ceil_div(w.out, kColumns) * blocks, 1, [&](int64_t task, int64_t) {
    const int64_t first = task % blocks * kDepth;
    fill_any(w, task / blocks, first, std::min(first + kDepth, w.in), panels);
  });
}

}  // namespace

void pack_conv_weight(Dtype dtype, const ConvWeights& weights, void* panels) {
  dtype == Dtype::f64 ? panels_of(weights, static_cast<double*>(panels))
                      : panels_of(weights, static_cast<float*>(panels));
}

}  // namespace spade
