// Winograd's F(2 x 2, 3 x 3) (Lavin and Gray 2016): four outputs take 16 products per pair of channels instead of 36.
// Its coefficients are 0, 1, -1 and, for the weights, 1/2: fewer sums than a direct convolution has, so no less exact.
#include "gemm.h"
#include "kernels.h"
#include "scratch.h"
#include "vector.h"

namespace spade {
namespace {

constexpr int64_t kPoints = 16;  // of a transformed tile
constexpr int64_t kDepth = 64;   // channels multiplied at a time
constexpr int64_t kColumns = kPanelColumns;
constexpr int64_t kFewestTiles = 36, kMostTiles = 132;
// Between what belongs to two points, so that a tile's points do not all meet in the same set of a cache.
constexpr int64_t kGap = 16;
constexpr int64_t kLine = 64;

template <class A>
constexpr int kLanes = static_cast<int>(kLine / sizeof(A));

// `lanes` values, wherever they lie.
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

// The 2 x 2 outputs from (2 * i, 2 * j) on are tile (i, j) of an image; tiles are numbered through all images.
struct Tiles {
  int64_t height, width, down, across, count;

  explicit Tiles(const Conv3x3Params& p)
      : height(p.height),
        width(p.width),
        down(divide_up(height, 2)),
        across(divide_up(width, 2)),
        count(p.images * down * across) {}

  // The pixel (i, j) away from a tile's first output, or -1 outside the image.
  int64_t pixel(int64_t tile, int64_t i, int64_t j) const {
    const int64_t image = tile / (down * across);
    const int64_t y = 2 * (tile / across % down) + i, x = 2 * (tile % across) + j;
    return y < 0 || y >= height || x < 0 || x >= width ? -1 : (image * height + y) * width + x;
  }
};

// What a task makes: the outputs of tiles [first, first + count) in panels [first_panel, last_panel).
template <class A>
struct Task {
  const Conv3x3Params& p;
  const Tiles& tiles;
  int64_t first, count, first_panel, last_panel;
  int64_t rows;    // count, rounded up to what the microkernel takes
  const A* zeros;  // a pixel outside the image

  // The transformed input of one point: (depths, rows, kDepth).
  int64_t input_size() const {
    return divide_up(p.in, kDepth) * rows * kDepth + kGap;
  }
  // The products of one point: (panels, rows, kColumns).
  int64_t product_size() const {
    return (last_panel - first_panel) * rows * kColumns + kGap;
  }
};

// B^T d B of the 4 x 4 pixels d, for `lanes` channels; its points are `apart` apart.
template <class A, int lanes>
SPADE_INLINE void transform_input(const A* const d[kPoints], int64_t channel, A* to, int64_t apart) {
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
  for (int i = 0; i < 4; ++i, to += 4 * apart) {
    const auto* h = half[i];
    L::at(to) = h[0] - h[2];
    L::at(to + apart) = h[1] + h[2];
    L::at(to + 2 * apart) = h[2] - h[1];
    L::at(to + 3 * apart) = h[1] - h[3];
  }
}

template <class A>
SPADE_INLINE void transform_inputs(const Task<A>& task, A* inputs) {
  const int64_t channels = task.p.in, apart = task.input_size();
  for (int64_t t = 0; t < task.rows; ++t) {
    const A* d[kPoints];
    for (int64_t i = 0; i < 4; ++i)
      for (int64_t j = 0; j < 4; ++j) {
        const int64_t pixel = t < task.count ? task.tiles.pixel(task.first + t, i - 1, j - 1) : -1;
        d[4 * i + j] = pixel < 0 ? task.zeros : static_cast<const A*>(task.p.x) + pixel * channels;
      }
    const auto place = [&](int64_t c) { return inputs + (c / kDepth * task.rows + t) * kDepth + c % kDepth; };
    int64_t c = 0;
    for (; c + kLanes<A> <= channels; c += kLanes<A>) transform_input<A, kLanes<A>>(d, c, place(c), apart);
    for (; c < channels; ++c) transform_input<A, 1>(d, c, place(c), apart);
  }
}

// The products of one point with one panel of its weights, (in, kColumns), while what comes next is on its way here.
template <class A>
void multiply(const Task<A>& task, const A* inputs, const A* panel, A* products) {
  const Microkernel<A>& kernel = microkernel<A>();
  const int64_t soon = kDepth * kColumns / (task.rows / kernel.rows);
  for (int64_t d = 0; d < task.p.in; d += kDepth, inputs += task.rows * kDepth, panel += kDepth * kColumns)
    for (int64_t r = 0; r < task.rows; r += kernel.rows) {
      const A* next = panel + kDepth * kColumns + r / kernel.rows * soon;
      for (int64_t i = 0; i < soon; i += kLanes<A>) __builtin_prefetch(next + i, 0, 2);
      for (int64_t c = 0; c < kColumns; c += kernel.columns)
        kernel.tile(std::min(kDepth, task.p.in - d), inputs + r * kDepth, kDepth, panel + c, kColumns,
                    products + r * kColumns + c, kColumns, d > 0);
    }
}

// A^T m A + bias + add at a tile's outputs (null: outside the image), for `lanes` channels of them.
template <class A, int lanes>
SPADE_INLINE void transform_output(const A* m, int64_t apart, const A* bias, const A* const add[4], A* const out[4],
                                   bool relu, int64_t channel) {
  using L = Lanes<A, lanes>;
  const typename L::Vector zero = {};
  typename L::Vector half[2][4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const typename L::Vector m0 = L::at(m + j * apart), m1 = L::at(m + (4 + j) * apart);
    const typename L::Vector m2 = L::at(m + (8 + j) * apart), m3 = L::at(m + (12 + j) * apart);
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
SPADE_INLINE void transform_outputs(const Task<A>& task, const A* products) {
  const Conv3x3Params& p = task.p;
  const int64_t apart = task.product_size();
  for (int64_t t = 0; t < task.count; ++t) {
    const A* add[4] = {};
    A* out[4] = {};
    for (int64_t k = 0; k < 4; ++k) {
      const int64_t pixel = task.tiles.pixel(task.first + t, k / 2, k % 2);
      if (pixel < 0) continue;
      out[k] = static_cast<A*>(p.y) + pixel * p.out;
      if (p.add) add[k] = static_cast<const A*>(p.add) + pixel * p.out;
    }
    for (int64_t j = task.first_panel; j < task.last_panel; ++j) {
      const int64_t begin = j * kColumns, end = std::min(begin + kColumns, p.out);
      const A* m = products + ((j - task.first_panel) * task.rows + t) * kColumns - begin;
      const A* bias = static_cast<const A*>(p.bias);
      int64_t c = begin;
      for (; c + kLanes<A> <= end; c += kLanes<A>)
        transform_output<A, kLanes<A>>(m + c, apart, bias, add, out, p.relu, c);
      for (; c < end; ++c) transform_output<A, 1>(m + c, apart, bias, add, out, p.relu, c);
    }
  }
}

SPADE_EVERY_CPU void inputs_any(const Task<float>& task, float* inputs) {
  transform_inputs(task, inputs);
}
SPADE_EVERY_CPU void inputs_any(const Task<double>& task, double* inputs) {
  transform_inputs(task, inputs);
}
SPADE_EVERY_CPU void outputs_any(const Task<float>& task, const float* products) {
  transform_outputs(task, products);
}
SPADE_EVERY_CPU void outputs_any(const Task<double>& task, const double* products) {
  transform_outputs(task, products);
}

template <class A>
void run(const Task<A>& task) {
  const Conv3x3Params& p = task.p;
  const int64_t panels = divide_up(p.out, kColumns);
  const Scratch<A> inputs(kPoints * task.input_size()), products(kPoints * task.product_size());
  inputs_any(task, inputs.data());
  // Point by point: its inputs stay in cache while its weights, the larger part in a deep network, pass once.
  for (int64_t point = 0; point < kPoints; ++point)
    for (int64_t j = task.first_panel; j < task.last_panel; ++j)
      multiply(task, inputs.data() + point * task.input_size(),
               static_cast<const A*>(p.weights) + (point * panels + j) * p.in * kColumns,
               products.data() + point * task.product_size() + (j - task.first_panel) * task.rows * kColumns);
  outputs_any(task, products.data());
}

// How the work is cut depends on the number of threads; the order in which an element is summed does not.
template <class A>
void convolve(const Conv3x3Params& p) {
  const Tiles tiles(p);
  const int64_t threads = torch::stable::get_num_threads(), panels = divide_up(p.out, kColumns);
  const int64_t parts =
      std::max(divide_up(tiles.count, kMostTiles), std::min(threads, divide_up(tiles.count, kFewestTiles)));
  const int64_t step = microkernel<A>().rows, size = divide_up(divide_up(tiles.count, parts), step) * step;
  const int64_t blocks = divide_up(tiles.count, size);
  const int64_t panels_each = divide_up(panels, std::min(panels, divide_up(threads, blocks)));
  const int64_t groups = divide_up(panels, panels_each);
  const Scratch<A> zeros(p.in);
  std::fill_n(zeros.data(), p.in, A(0));
  in_pieces(blocks * groups, 1, [&](int64_t i, int64_t) {
    const int64_t first = i / groups * size, first_panel = i % groups * panels_each;
    const int64_t count = std::min(size, tiles.count - first);
    run(Task<A>{p, tiles, first, count, first_panel, std::min(first_panel + panels_each, panels),
                divide_up(count, step) * step, zeros.data()});
  });
}

// One dimension of G g: 4 values from 3.
void transform_weight(const double g[3], double to[4]) {
  to[0] = g[0];
  to[1] = (g[0] + g[1] + g[2]) / 2;
  to[2] = (g[0] - g[1] + g[2]) / 2;
  to[3] = g[2];
}

template <class A>
void weights_of(const Conv3x3Weights& w, A* to) {
  const int64_t panels = divide_up(w.out, kColumns);
  in_pieces(panels, 1, [&](int64_t panel, int64_t) {
    for (int64_t d = 0; d < w.in; ++d)
      for (int64_t c = 0; c < kColumns; ++c) {
        const int64_t o = panel * kColumns + c;
        const A* from = static_cast<const A*>(w.weight) + o * w.out_step + d * w.in_step;
        double half[3][4] = {};
        for (int i = 0; i < 3 && o < w.out; ++i) {
          const double row[3] = {from[3 * i * w.tap], from[(3 * i + 1) * w.tap], from[(3 * i + 2) * w.tap]};
          transform_weight(row, half[i]);
        }
        for (int64_t j = 0; j < 4; ++j) {
          const double column[3] = {half[0][j], half[1][j], half[2][j]};
          double all[4];
          transform_weight(column, all);
          for (int64_t i = 0; i < 4; ++i)
            to[(((4 * i + j) * panels + panel) * w.in + d) * kColumns + c] = static_cast<A>(all[i]);
        }
      }
  });
}

}  // namespace

void conv3x3(Dtype dtype, const Conv3x3Params& p) {
  dtype == Dtype::f64 ? convolve<double>(p) : convolve<float>(p);
}

void conv3x3_weights(Dtype dtype, const Conv3x3Weights& weights, void* panels) {
  dtype == Dtype::f64 ? weights_of(weights, static_cast<double*>(panels))
                      : weights_of(weights, static_cast<float*>(panels));
}

}  // namespace spade
