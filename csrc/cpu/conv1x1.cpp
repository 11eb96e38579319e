// A 1 x 1 convolution is a matrix product. It has a kernel of its own so that its input can be modulated when it is
// read.
#include <limits>

#include "conv.h"
#include "gemm.h"
#include "modulate.h"
#include "scratch.h"
#include "vector.h"

namespace spade {
namespace {

constexpr int64_t kDepth = 64;  // channels multiplied at a time
constexpr int64_t kColumns = kPanelColumns;
constexpr int64_t kFewestPixels = 24, kMostPixels = 48;
// Extra elements per pixel: without them, one channel of all pixels could fall into the same set of a cache.
constexpr int64_t kGap = 16;

// Writes the outputs of pixels [first, last) in `columns` columns, beginning with `column`, from their products.
template <class A>
SPADE_INLINE void finish_columns(const ConvParams& p, const A* products, int64_t first, int64_t last, int64_t column,
                                 int64_t columns) {
  const A* bias = static_cast<const A*>(p.bias) + column;
  const A least = p.relu ? A(0) : -std::numeric_limits<A>::infinity();
  for (int64_t i = first; i < last; ++i, products += kColumns) {
    A* y = static_cast<A*>(p.y) + i * p.out + column;
    const A* add = p.add ? static_cast<const A*>(p.add) + i * p.out + column : nullptr;
#pragma GCC ivdep
    for (int64_t c = 0; c < columns; ++c) {
      const A sum = products[c] + bias[c], value = add ? sum + add[c] : sum;
      y[c] = value < least ? least : value;
    }
  }
}

template <class A>
SPADE_INLINE void finish(const ConvParams& p, const A* products, int64_t first, int64_t last, int64_t column) {
  if (p.out - column >= kColumns)
    finish_columns(p, products, first, last, column, kColumns);
  else
    finish_columns(p, products, first, last, column, p.out - column);
}
SPADE_TARGET_CLONES void finish_any(const ConvParams& p, const float* m, int64_t first, int64_t last, int64_t column) {
  finish(p, m, first, last, column);
}
SPADE_TARGET_CLONES void finish_any(const ConvParams& p, const double* m, int64_t first, int64_t last, int64_t column) {
  finish(p, m, first, last, column);
}

// Computes the outputs of pixels [first, last) in panels [first_panel, last_panel).
template <class A>
void run(Dtype dtype, const ConvParams& p, int64_t first, int64_t last, int64_t first_panel, int64_t last_panel) {
  const Microkernel<A>& kernel = microkernel<A>();
  const int64_t count = last - first, rows = ceil_div(count, kernel.rows) * kernel.rows, row = p.in + kGap;
  const Scratch<A> pixels(rows * row), products(rows * kColumns);
  if (p.modulated)
    modulate_pixels(dtype, *p.modulated, first, last, pixels.data(), row);
  else
    for (int64_t i = 0; i < count; ++i)
      std::copy_n(static_cast<const A*>(p.x) + (first + i) * p.in, p.in, pixels.data() + i * row);
  std::fill_n(pixels.data() + count * row, (rows - count) * row, A(0));
  for (int64_t j = first_panel; j < last_panel; ++j) {
    const A* panel = static_cast<const A*>(p.panels) + j * p.in * kColumns;
    for (int64_t d = 0; d < p.in; d += kDepth)
      for (int64_t r = 0; r < rows; r += kernel.rows)
        for (int64_t c = 0; c < kColumns; c += kernel.columns)
          kernel.tile(std::min(kDepth, p.in - d), pixels.data() + r * row + d, row, panel + d * kColumns + c, kColumns,
                      products.data() + r * kColumns + c, kColumns, d > 0);
    finish_any(p, products.data(), first, last, j * kColumns);
  }
}

template <class A>
void convolve(Dtype dtype, const ConvParams& p) {
  const int64_t threads = torch::stable::get_num_threads(), panels = ceil_div(p.out, kColumns);
  const int64_t pixels = p.images * p.height * p.width;
  const int64_t parts = std::max(ceil_div(pixels, kMostPixels), std::min(threads, ceil_div(pixels, kFewestPixels)));
  const int64_t size = ceil_div(pixels, parts), blocks = ceil_div(pixels, size);
  const int64_t panels_each = ceil_div(panels, std::min(panels, ceil_div(threads, blocks)));
  const int64_t groups = ceil_div(panels, panels_each);
  parallel_for_chunks(blocks * groups, 1, [&](int64_t i, int64_t) {
    const int64_t first = i / groups * size, first_panel = i % groups * panels_each;
    run<A>(dtype, p, first, std::min(first + size, pixels), first_panel, std::min(first_panel + panels_each, panels));
  });
}

}  // namespace

void conv1x1(Dtype dtype, const ConvParams& p) {
  dtype == Dtype::f64 ? convolve<double>(dtype, p) : convolve<float>(dtype, p);
}

}  // namespace spade
