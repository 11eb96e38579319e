// The gradient of a 3 x 3 convolution's weight, in Winograd's form: G^T (sum over tiles of A dy A^T * B^T d B) G.
#include "conv3x3.h"
#include "gemm.h"
#include "scratch.h"
#include "vector.h"

namespace spade {
namespace {

constexpr int64_t kValuesAtOnce = int64_t{4} << 20;  // transformed inputs and gradients kept at a time
constexpr int64_t kTilesPerTask = 16;
constexpr int64_t kDepth = 64;  // tiles multiplied at a time
constexpr int64_t kChannels = 48, kColumns = kPanelColumns;
constexpr int64_t kSide = 16;  // side of a square of channels that is transposed at a time

// The tiles [first, first + count) of the whole batch: inputs (points, blocks, count, kChannels), and gradients
// (points, panels, count, kColumns).
template <class A>
struct Transformed {
  A *inputs, *grads;
  int64_t first, count, blocks, panels;

  int64_t input_size() const {
    return blocks * count * kChannels + kGap;
  }
  int64_t grad_size() const {
    return panels * count * kColumns + kGap;
  }
};

// A dy A^T of the 2 x 2 pixels dy.
template <class A, int lanes>
SPADE_INLINE void transform_grad(const A* const dy[4], int64_t channel, A* to, int64_t point_stride) {
  using L = Lanes<A, lanes>;
  typename L::Vector half[4][2];
#pragma GCC unroll 2
  for (int j = 0; j < 2; ++j) {
    const typename L::Vector d0 = L::at(dy[j] + channel), d1 = L::at(dy[2 + j] + channel);
    half[0][j] = d0;
    half[1][j] = d0 + d1;
    half[2][j] = d0 - d1;
    half[3][j] = -d1;
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i, to += 4 * point_stride) {
    const auto* h = half[i];
    L::at(to) = h[0];
    L::at(to + point_stride) = h[0] + h[1];
    L::at(to + 2 * point_stride) = h[0] - h[1];
    L::at(to + 3 * point_stride) = -h[1];
  }
}

// The address of channel c of tile t in values (blocks of channels, count, width).
template <class A, int64_t width>
SPADE_INLINE A* place(A* values, int64_t count, int64_t t, int64_t c) {
  return values + (c / width * count + t) * width + c % width;
}

// Transforms inputs and gradients of the tiles [begin, end), counted from to.first.
template <class A>
SPADE_INLINE void transform(const ConvWeightGradParams& p, int64_t begin, int64_t end, const Transformed<A>& to) {
  const Scratch<A> outside(std::max(p.in, p.out));
  std::fill_n(outside.data(), std::max(p.in, p.out), A(0));
  const int64_t down = ceil_div(p.height, 2), across = ceil_div(p.width, 2);
  for (int64_t t = begin; t < end; ++t) {
    const int64_t tile = to.first + t, image = tile / (down * across);
    const int64_t top = 2 * (tile / across % down), left = 2 * (tile % across);
    const auto pixel = [&](const void* values, int64_t y, int64_t x, int64_t channels) {
      const bool inside = y >= 0 && y < p.height && x >= 0 && x < p.width;
      return inside ? static_cast<const A*>(values) + ((image * p.height + y) * p.width + x) * channels
                    : outside.data();
    };
    const A *d[kPoints], *dy[4];
    for (int64_t i = 0; i < kPoints; ++i) d[i] = pixel(p.x, top - 1 + i / 4, left - 1 + i % 4, p.in);
    for (int64_t i = 0; i < 4; ++i) dy[i] = pixel(p.grad, top + i / 2, left + i % 2, p.out);
    const auto input = [&](int64_t c) { return place<A, kChannels>(to.inputs, to.count, t, c); };
    const auto grad = [&](int64_t c) { return place<A, kColumns>(to.grads, to.count, t, c); };
    int64_t c = 0;
    for (; c + kLanes<A> <= p.in; c += kLanes<A>) transform_input<A, kLanes<A>>(d, c, input(c), to.input_size());
    for (; c < p.in; ++c) transform_input<A, 1>(d, c, input(c), to.input_size());
    for (; c < to.blocks * kChannels; ++c)
      for (int64_t k = 0; k < kPoints; ++k) input(c)[k * to.input_size()] = 0;
    for (c = 0; c + kLanes<A> <= p.out; c += kLanes<A>) transform_grad<A, kLanes<A>>(dy, c, grad(c), to.grad_size());
    for (; c < p.out; ++c) transform_grad<A, 1>(dy, c, grad(c), to.grad_size());
    for (; c < to.panels * kColumns; ++c)
      for (int64_t k = 0; k < kPoints; ++k) grad(c)[k * to.grad_size()] = 0;
  }
}

// Writes G^T u G of input channels [in, in + kSide) and output channels [out, out + kSide) to d_weight (out, in, 9); u
// is (points, rows, row).
template <class A>
SPADE_INLINE void transform_back(const ConvWeightGradParams& p, const A* u, int64_t rows, int64_t row, int64_t in,
                                 int64_t out) {
  const int64_t ins = std::min(kSide, p.in - in), outs = std::min(kSide, p.out - out);
  A weights[kSide][kSide][9];  // by output channel, input channel and tap
  for (int64_t i = 0; i < ins; ++i) {
    A half[3][4][kSide], values[9][kSide];
    for (int j = 0; j < 4; ++j) {
      const auto at = [&](int k) { return u + ((4 * k + j) * rows + in + i) * row + out; };
      const A *u0 = at(0), *u1 = at(1), *u2 = at(2), *u3 = at(3);
#pragma GCC ivdep
      for (int64_t o = 0; o < kSide; ++o) {
        const A sum = (u1[o] + u2[o]) / 2;
        half[0][j][o] = u0[o] + sum;
        half[1][j][o] = (u1[o] - u2[o]) / 2;
        half[2][j][o] = u3[o] + sum;
      }
    }
    for (int k = 0; k < 3; ++k)
#pragma GCC ivdep
      for (int64_t o = 0; o < kSide; ++o) {
        const A sum = (half[k][1][o] + half[k][2][o]) / 2;
        values[3 * k][o] = half[k][0][o] + sum;
        values[3 * k + 1][o] = (half[k][1][o] - half[k][2][o]) / 2;
        values[3 * k + 2][o] = half[k][3][o] + sum;
      }
    for (int t = 0; t < 9; ++t)
      for (int64_t o = 0; o < kSide; ++o) weights[o][i][t] = values[t][o];
  }
  for (int64_t o = 0; o < outs; ++o)
    std::copy_n(weights[o][0], 9 * ins, static_cast<A*>(p.d_weight) + ((out + o) * p.in + in) * 9);
}

#define SPADE_FOR_TYPE(A)                                                                                             \
  SPADE_TARGET_CLONES void transform_any(const ConvWeightGradParams& p, int64_t begin, int64_t end,                   \
                                         const Transformed<A>& to) {                                                  \
    transform(p, begin, end, to);                                                                                     \
  }                                                                                                                   \
  SPADE_TARGET_CLONES void back_any(const ConvWeightGradParams& p, const A* u, int64_t rows, int64_t row, int64_t in, \
                                    int64_t out) {                                                                    \
    transform_back(p, u, rows, row, in, out);                                                                         \
  }
SPADE_FOR_TYPE(float)
SPADE_FOR_TYPE(double)
#undef SPADE_FOR_TYPE

// Computes sums (kChannels, row) = inputs^T @ grads of one point and one block of channels, or adds that to sums.
template <class A>
void multiply(int64_t count, int64_t panels, const A* inputs, const A* grads, A* sums, bool add) {
  const Microkernel<A>& kernel = microkernel<A>();
  const int64_t row = panels * kColumns;
  for (int64_t j = 0; j < panels; ++j, grads += count * kColumns)
    for (int64_t d = 0; d < count; d += kDepth)
      for (int64_t r = 0; r < kChannels; r += kernel.rows)
        for (int64_t c = 0; c < kColumns; c += kernel.columns)
          kernel.transposed(std::min(kDepth, count - d), inputs + d * kChannels + r, kChannels,
                            grads + d * kColumns + c, kColumns, sums + r * row + j * kColumns + c, row, add || d > 0);
}

template <class A>
void weight_grad(const ConvWeightGradParams& p) {
  const int64_t blocks = ceil_div(p.in, kChannels), panels = ceil_div(p.out, kColumns);
  const int64_t rows = blocks * kChannels, row = panels * kColumns;
  const int64_t tiles = p.images * ceil_div(p.height, 2) * ceil_div(p.width, 2);
  const int64_t at_once = std::min(tiles, std::max(kValuesAtOnce / (kPoints * (rows + row)), kDepth));
  Transformed<A> some{nullptr, nullptr, 0, at_once, blocks, panels};
  const Scratch<A> inputs(kPoints * some.input_size()), grads(kPoints * some.grad_size()), sums(kPoints * rows * row);
  some.inputs = inputs.data();
  some.grads = grads.data();
  if (tiles == 0) std::fill_n(sums.data(), kPoints * rows * row, A(0));
  for (; some.first < tiles; some.first += at_once) {
    some.count = std::min(at_once, tiles - some.first);
    parallel_for_chunks(some.count, kTilesPerTask,
                        [&](int64_t begin, int64_t end) { transform_any(p, begin, end, some); });
    parallel_for_chunks(kPoints * blocks, 1, [&](int64_t task, int64_t) {
      const int64_t point = task / blocks, block = task % blocks;
      multiply(some.count, panels, some.inputs + point * some.input_size() + block * some.count * kChannels,
               some.grads + point * some.grad_size(), sums.data() + task * kChannels * row, some.first > 0);
    });
  }
  const int64_t across = ceil_div(p.in, kSide);
  parallel_for_chunks(across * ceil_div(p.out, kSide), 1, [&](int64_t task, int64_t) {
    back_any(p, sums.data(), rows, row, task % across * kSide, task / across * kSide);
  });
}

}  // namespace

void conv3x3_weight_grad(Dtype dtype, const ConvWeightGradParams& p) {
  dtype == Dtype::f64 ? weight_grad<double>(p) : weight_grad<float>(p);
}

}  // namespace spade
