// The forward of the 3 x 3 convolution, with the transforms of conv3x3.h.
#include "conv3x3.h"

#include "gemm.h"
#include "modulate.h"
#include "scratch.h"
#include "vector.h"

namespace spade {
namespace {

constexpr int64_t kDepth = 64;  // channels multiplied at a time
constexpr int64_t kColumns = kPanelColumns;
// Tiles of a task: with fewer, reading the weights takes too much of the time; with more, the data do not fit into
// cache.
constexpr int64_t kFewestTiles = 36, kMostTiles = 132;

// The outputs that one task computes, from a rectangle of an image's tiles and for some of the panels. Tile (i, j) has
// the 2 x 2 outputs whose first is pixel (2 * i, 2 * j).
struct Block {
  int64_t image, top, bottom, left, right;
  int64_t first_panel, last_panel;
  int64_t rows;  // number of tiles, rounded up to a multiple of the microkernel's rows

  int64_t across() const {
    return right - left;
  }
  int64_t tiles() const {
    return (bottom - top) * across();
  }
  // The transformed inputs of one point: (depths, rows, kDepth).
  int64_t input_size(int64_t channels) const {
    return ceil_div(channels, kDepth) * rows * kDepth + kGap;
  }
  // The products of one point: (panels, rows, kColumns).
  int64_t product_size() const {
    return (last_panel - first_panel) * rows * kColumns + kGap;
  }
};

// The pixels that a block reads: pixel (y, x) of its image is number y * width + x - first in `pixels`.
template <class A>
struct Source {
  const A* pixels;
  int64_t width, first;
};

template <class A>
SPADE_INLINE void transform_inputs(const ConvParams& p, const Block& block, Source<A> source, A* inputs) {
  const Scratch<A> outside(p.in);
  std::fill_n(outside.data(), p.in, A(0));
  const int64_t point_stride = block.input_size(p.in);
  for (int64_t t = 0; t < block.rows; ++t) {
    const int64_t top = 2 * (block.top + t / block.across()) - 1, left = 2 * (block.left + t % block.across()) - 1;
    const A* d[kPoints];
    for (int64_t i = 0; i < kPoints; ++i) {
      const int64_t y = top + i / 4, x = left + i % 4;
      const bool inside = t < block.tiles() && y >= 0 && y < p.height && x >= 0 && x < p.width;
      d[i] = inside ? source.pixels + (y * source.width + x - source.first) * p.in : outside.data();
    }
    const auto to = [&](int64_t c) { return inputs + (c / kDepth * block.rows + t) * kDepth + c % kDepth; };
    int64_t c = 0;
    for (; c + kLanes<A> <= p.in; c += kLanes<A>) transform_input<A, kLanes<A>>(d, c, to(c), point_stride);
    for (; c < p.in; ++c) transform_input<A, 1>(d, c, to(c), point_stride);
  }
}

// Multiplies the inputs of one point with one panel of its weights, (in, kColumns), and prefetches the next weights.
template <class A>
void multiply(int64_t channels, int64_t rows, const A* inputs, const A* panel, A* products) {
  const Microkernel<A>& kernel = microkernel<A>();
  const int64_t soon = kDepth * kColumns / (rows / kernel.rows);
  for (int64_t d = 0; d < channels; d += kDepth, inputs += rows * kDepth, panel += kDepth * kColumns)
    for (int64_t r = 0; r < rows; r += kernel.rows) {
      const A* next = panel + kDepth * kColumns + r / kernel.rows * soon;
      for (int64_t i = 0; i < soon; i += kLanes<A>) __builtin_prefetch(next + i, 0, 2);
      for (int64_t c = 0; c < kColumns; c += kernel.columns)
        kernel.tile(std::min(kDepth, channels - d), inputs + r * kDepth, kDepth, panel + c, kColumns,
                    products + r * kColumns + c, kColumns, d > 0);
    }
}

// Writes A^T m A + bias + add to a tile's outputs, for `lanes` channels. Outputs outside the image are null.
template <class A, int lanes>
SPADE_INLINE void transform_output(const A* m, int64_t point_stride, const A* bias, const A* const add[4],
                                   A* const out[4], bool relu, int64_t channel) {
  using L = Lanes<A, lanes>;
  const typename L::Vector zero = {};
  typename L::Vector half[2][4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const typename L::Vector m0 = L::at(m + j * point_stride), m1 = L::at(m + (4 + j) * point_stride);
    const typename L::Vector m2 = L::at(m + (8 + j) * point_stride), m3 = L::at(m + (12 + j) * point_stride);
    half[0][j] = m0 + m1 + m2;
    half[1][j] = m1 - m2 - m3;
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const auto* h = half[i];
    const typename L::Vector y[2] = {h[0] + h[1] + h[2], h[1] - h[2] - h[3]};
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      if (!out[2 * i + j]) continue;
      typename L::Vector value = y[j] + L::at(bias + channel);
      if (add[2 * i + j]) value += L::at(add[2 * i + j] + channel);
      if (relu) value = value < zero ? zero : value;
      L::at(out[2 * i + j] + channel) = value;
    }
  }
}

template <class A>
SPADE_INLINE void transform_outputs(const ConvParams& p, const Block& block, const A* products) {
  const A* bias = static_cast<const A*>(p.bias);
  const int64_t point_stride = block.product_size(), image = block.image * p.height * p.width;
  for (int64_t t = 0; t < block.tiles(); ++t) {
    const int64_t top = 2 * (block.top + t / block.across()), left = 2 * (block.left + t % block.across());
    const A* add[4] = {};
    A* out[4] = {};
    for (int64_t i = 0; i < 4; ++i) {
      const int64_t y = top + i / 2, x = left + i % 2, place = (image + y * p.width + x) * p.out;
      if (y >= p.height || x >= p.width) continue;
      out[i] = static_cast<A*>(p.y) + place;
      if (p.add) add[i] = static_cast<const A*>(p.add) + place;
    }
    for (int64_t j = block.first_panel; j < block.last_panel; ++j) {
      const int64_t begin = j * kColumns, end = std::min(begin + kColumns, p.out);
      const A* m = products + ((j - block.first_panel) * block.rows + t) * kColumns;
      int64_t c = begin;
      for (; c + kLanes<A> <= end; c += kLanes<A>, m += kLanes<A>)
        transform_output<A, kLanes<A>>(m, point_stride, bias, add, out, p.relu, c);
      for (; c < end; ++c, ++m) transform_output<A, 1>(m, point_stride, bias, add, out, p.relu, c);
    }
  }
}

#define SPADE_FOR_TYPE(A)                                                                                     \
  SPADE_TARGET_CLONES void inputs_any(const ConvParams& p, const Block& block, Source<A> source, A* inputs) { \
    transform_inputs(p, block, source, inputs);                                                               \
  }                                                                                                           \
  SPADE_TARGET_CLONES void outputs_any(const ConvParams& p, const Block& block, const A* products) {          \
    transform_outputs(p, block, products);                                                                    \
  }
SPADE_FOR_TYPE(float)
SPADE_FOR_TYPE(double)
#undef SPADE_FOR_TYPE

// Modulates the pixels that a block reads, and writes them to `memory`.
template <class A>
Source<A> modulated(Dtype dtype, const ConvParams& p, const Block& block, A* memory) {
  const int64_t top = std::max(2 * block.top - 1, int64_t{0}), bottom = std::min(2 * block.bottom + 1, p.height);
  const int64_t left = std::max(2 * block.left - 1, int64_t{0}), right = std::min(2 * block.right + 1, p.width);
  for (int64_t y = top; y < bottom; ++y) {
    const int64_t first = (block.image * p.height + y) * p.width;
    modulate_pixels(dtype, *p.modulated, first + left, first + right, memory + (y - top) * (right - left) * p.in, p.in);
  }
  return {memory, right - left, top * (right - left) + left};
}

template <class A>
void run(Dtype dtype, const ConvParams& p, const Block& block) {
  const int64_t panels = ceil_div(p.out, kColumns), input_size = block.input_size(p.in);
  const Scratch<A> inputs(kPoints * input_size), products(kPoints * block.product_size());
  if (p.modulated) {
    const Scratch<A> pixels(2 * (block.bottom - block.top + 1) * 2 * (block.across() + 1) * p.in);
    inputs_any(p, block, modulated(dtype, p, block, pixels.data()), inputs.data());
  } else {
    const A* x = static_cast<const A*>(p.x) + block.image * p.height * p.width * p.in;
    inputs_any(p, block, Source<A>{x, p.width, 0}, inputs.data());
  }
  // Points are multiplied one after the other: the inputs of a point stay in cache, and its weights, which are larger
  // in a deep network, are read once.
  for (int64_t point = 0; point < kPoints; ++point)
    for (int64_t j = block.first_panel; j < block.last_panel; ++j)
      multiply(p.in, block.rows, inputs.data() + point * input_size,
               static_cast<const A*>(p.panels) + (point * panels + j) * p.in * kColumns,
               products.data() + point * block.product_size() + (j - block.first_panel) * block.rows * kColumns);
  outputs_any(p, block, products.data());
}

// How the work is cut depends on the number of threads; the order in which an element is summed does not.
template <class A>
void convolve(Dtype dtype, const ConvParams& p) {
  const int64_t threads = torch::stable::get_num_threads(), panels = ceil_div(p.out, kColumns);
  const int64_t down = ceil_div(p.height, 2), across = ceil_div(p.width, 2);
  const int64_t width = ceil_div(across, ceil_div(across, kMostTiles)), columns = ceil_div(across, width);
  const int64_t wanted = std::min(ceil_div(threads, p.images * columns), ceil_div(down * width, kFewestTiles));
  const int64_t height =
      ceil_div(down, std::clamp(wanted, ceil_div(down, std::max(kMostTiles / width, int64_t{1})), down));
  const int64_t lines = ceil_div(down, height), blocks = p.images * lines * columns;
  const int64_t panels_each = ceil_div(panels, std::min(panels, ceil_div(threads, blocks)));
  const int64_t groups = ceil_div(panels, panels_each);
  parallel_for_chunks(blocks * groups, 1, [&](int64_t i, int64_t) {
    const int64_t at = i / groups, top = at / columns % lines * height, left = at % columns * width;
    const int64_t first_panel = i % groups * panels_each, step = microkernel<A>().rows;
    Block block{at / columns / lines,
                top,
                std::min(top + height, down),
                left,
                std::min(left + width, across),
                first_panel,
                std::min(first_panel + panels_each, panels),
                0};
    block.rows = ceil_div(block.tiles(), step) * step;
    run<A>(dtype, p, block);
  });
}

}  // namespace

void conv3x3(Dtype dtype, const ConvParams& p) {
  dtype == Dtype::f64 ? convolve<double>(dtype, p) : convolve<float>(dtype, p);
}

}  // namespace spade
