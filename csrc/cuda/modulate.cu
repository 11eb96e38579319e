#include "kernels.h"
#include "pixels.h"

namespace spade::cuda {
namespace {

// y, from one read of x: pixels of x, each with the upsample x upsample pixels of y it stands for.
template <class T, class S, int V, int upsample>
struct Forward {
  using A = acc_t<T>;
  static constexpr int kThreads = spade::cuda::kThreads;
  static constexpr int kShown = upsample * upsample;
  static constexpr int kPixels = upsample == 1 ? 2 : 1;  // of x, in flight together
  ModulateParams p;

  SPADE_DEVICE void operator()(const Thread& t) const {
    const int64_t channel = (static_cast<int64_t>(t.y) * t.lanes + t.lane) * V, pixels = p.height * p.width;
    const int64_t first = static_cast<int64_t>(t.x) * t.rows * kPixels + t.row;
    if (channel >= p.channels || first >= pixels) return;
    int64_t at[kPixels * kShown], row[kPixels * kShown];
    Values<T, V> x[kPixels];
    Row<S, V> rows[kPixels * kShown];
    Statistics<A, V> stats;
    // What waits for nothing is asked for before the table's rows, which wait for their numbers. Past the end, the last
    // pixel is written once more, the same: under a condition, the compiler would load one pixel after another.
#pragma unroll
    for (int i = 0; i < kPixels * kShown; ++i) {
      const int64_t source = min(first + i / kShown * t.rows, pixels - 1);
      at[i] = shown_at<upsample>(p, t.z, source, i % kShown);
      row[i] = row_of(p, at[i]);
      if (i % kShown == 0) x[i / kShown].load(p.x, (t.z * pixels + source) * p.channels + channel);
    }
    stats.load(p, t.z, channel);
#pragma unroll
    for (int i = 0; i < kPixels * kShown; ++i) rows[i].load(p, row[i], channel);
    const A negative_slope = static_cast<A>(p.negative_slope);
#pragma unroll
    for (int i = 0; i < kPixels * kShown; ++i) {
      Values<T, V> y;
#pragma unroll
      for (int c = 0; c < V; ++c) {
        const A value = rows[i].apply(stats.xhat(x[i / kShown], c), c);
        y.at[c] = static_cast<T>(value > 0 ? value : value * negative_slope);
      }
      y.store(p.out, at[i] * p.channels + channel);
    }
  }
};

// The gradient of x, a pixel at a time.
template <class T, class S, int V, int upsample>
struct InputGrad {
  using A = acc_t<T>;
  static constexpr int kThreads = spade::cuda::kThreads;
  static constexpr int kShown = upsample * upsample;
  ModulateParams p;

  SPADE_DEVICE void operator()(const Thread& t) const {
    const int64_t channel = (static_cast<int64_t>(t.y) * t.lanes + t.lane) * V, pixels = p.height * p.width;
    const int64_t source = static_cast<int64_t>(t.x) * t.rows + t.row;
    if (channel >= p.channels || source >= pixels) return;
    const int64_t at = (t.z * pixels + source) * p.channels + channel;
    Values<T, V> x, grad[kShown];
    Row<S, V> rows[kShown];
    x.load(p.x, at);
#pragma unroll
    for (int s = 0; s < kShown; ++s) {
      const int64_t shown = shown_at<upsample>(p, t.z, source, s);
      grad[s].load(p.grad, shown * p.channels + channel);
      rows[s].load(p, row_of(p, shown), channel);
    }
    Statistics<A, V> stats;
    stats.load(p, t.z, channel);
    Values<A, V> mean_shift{}, mean_scale{};
    if (p.mean_shift) {
      mean_shift.load(p.mean_shift, t.z * p.means_stride + channel);
      mean_scale.load(p.mean_scale, t.z * p.means_stride + channel);
    }
    const A negative_slope = static_cast<A>(p.negative_slope);
#pragma unroll
    for (int c = 0; c < V; ++c) {
      const A xhat = stats.xhat(x, c);
      A sum = 0;
#pragma unroll
      for (int s = 0; s < kShown; ++s) {
        const A dy = static_cast<A>(grad[s].at[c]);
        const A d = (rows[s].apply(xhat, c) > 0 ? dy : dy * negative_slope) * static_cast<A>(rows[s].scale.at[c]);
        sum += p.mean_shift ? d - mean_shift.at[c] - xhat * mean_scale.at[c] : d;
      }
      x.at[c] = static_cast<T>(sum * stats.rstd.at[c]);
    }
    x.store(p.out, at);
  }
};

// Launches Kernel<T, S, V, upsample> over the pixels of x, each thread taking `pixels` of them.
template <template <class, class, int, int> class Kernel>
void over_pixels(Dtype dtype, Dtype table, const ModulateParams& p, Stream stream, int64_t pixels) {
  for_modulate(dtype, table, p, [&](auto type, auto table_type, auto v, auto upsample) {
    Grid grid = grid_over(ceil_div(p.channels, v()), kMostLanes, p.images);
    grid.x = static_cast<uint32_t>(ceil_div(p.height * p.width, grid.rows * pixels));
    using T = typename decltype(type)::type;
    using S = typename decltype(table_type)::type;
    launch(grid, stream, Kernel<T, S, v(), upsample()>{p});
  });
}

}  // namespace

void modulate(Dtype dtype, Dtype table, const ModulateParams& p, Stream stream) {
  over_pixels<Forward>(dtype, table, p, stream, p.upsample == 2 ? 1 : 2);
}

void modulate_input_grad(Dtype dtype, Dtype table, const ModulateParams& p, Stream stream) {
  over_pixels<InputGrad>(dtype, table, p, stream, 1);
}

}  // namespace spade::cuda
