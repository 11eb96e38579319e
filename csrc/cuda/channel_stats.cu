// Mean and sum of squared deviations: one block computes them for a piece of an image's pixels, and a second kernel
// merges the pieces. Every sum has few terms and every tree has a fixed shape, so sums are accurate and the same in
// every run. A thread takes one of its pixels as origin, and from there on a mean is the sum of two numbers: means that
// are rounded to the magnitude of a channel would lose their differences.
#include <cmath>
#include <tuple>

#include "../channel_stats.h"
#include "access.h"
#include "calls.h"

namespace spade::cuda {
namespace {

constexpr int kBatch = 8;       // pixels that a thread holds in registers for two passes: mean, deviations
constexpr int kCandidates = 4;  // the first of these pixels, one of which becomes the origin
constexpr int64_t kPieceLanes = 32;
// With more pixels per thread, merges take less of the time; with fewer, there are blocks for every multiprocessor.
constexpr int kMostPixels = 4 * kBatch;
constexpr int64_t kWantedBlocks = 512;
constexpr uint32_t kMergeLanes = 32;

// Statistics of V channels over `count` pixels, with means relative to an origin; merged by Chan et al. (1979).
template <class A, int V>
struct StatsFromOrigin {
  A count = 0, mean[V] = {}, m2[V] = {};

  SPADE_DEVICE void merge(const StatsFromOrigin& other) {
    const A share = other.count / (count + other.count), weight = count * share;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const A delta = other.mean[i] - mean[i];
      mean[i] += delta * share;
      m2[i] += other.m2[i] + delta * delta * weight;
    }
    count += other.count;
  }
};

// Statistics of V channels over `count` pixels, whose means are mean + rest.
template <class A, int V>
struct Stats {
  A count = 0, mean[V] = {}, rest[V] = {}, m2[V] = {};

  // Sets mean to a + b, rounded, and rest to the rounding error (Knuth's exact sum of two).
  SPADE_DEVICE void set_mean(int i, A a, A b) {
    mean[i] = a + b;
    const A of_b = mean[i] - a;
    rest[i] = (a - (mean[i] - of_b)) + (b - of_b);
  }

  // This object must have at least as many pixels as the other.
  SPADE_DEVICE void merge(const Stats& other) {
    if (other.count == 0) return;
    const A share = other.count / (count + other.count), weight = count * share;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const A delta = (other.mean[i] - mean[i]) + (other.rest[i] - rest[i]);
      set_mean(i, mean[i], rest[i] + delta * share);
      m2[i] += other.m2[i] + delta * delta * weight;
    }
    count += other.count;
  }
};

// One Stats for each thread of a block. Neighbouring threads use neighbouring banks of shared memory.
template <class A, int V, int threads>
struct SharedStats {
  A count[threads], mean[V][threads], rest[V][threads], m2[V][threads];

  SPADE_DEVICE void put(uint32_t thread, const Stats<A, V>& stats) {
    count[thread] = stats.count;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      mean[i][thread] = stats.mean[i];
      rest[i][thread] = stats.rest[i];
      m2[i][thread] = stats.m2[i];
    }
  }
  SPADE_DEVICE Stats<A, V> get(uint32_t thread) const {
    Stats<A, V> stats;
    stats.count = count[thread];
#pragma unroll
    for (int i = 0; i < V; ++i) {
      stats.mean[i] = mean[i][thread];
      stats.rest[i] = rest[i][thread];
      stats.m2[i] = m2[i][thread];
    }
    return stats;
  }
  SPADE_DEVICE Stats<A, 1> get_one(uint32_t thread, uint32_t channel) const {
    return {count[thread], {mean[channel][thread]}, {rest[channel][thread]}, {m2[channel][thread]}};
  }
  // Merges every `rows` rows of a block into the first of them, two by two. Rows without pixels come last.
  SPADE_DEVICE void merge_rows(const Block& block, uint32_t rows) {
    for (uint32_t step = 1; step < rows; step *= 2)
      block.phase([&](const Thread& t) {
        const uint32_t row = t.row % rows, thread = t.row * t.block_x + t.lane;
        if (row % (2 * step) != 0 || row + step >= rows || t.row + step >= t.block_y) return;
        Stats<A, V> stats = get(thread);
        stats.merge(get(thread + step * t.block_x));
        put(thread, stats);
      });
  }
};

// The pieces of an image. Their statistics (mean, rest, m2) are (images, pieces, 3, channels).
struct Pieces {
  int64_t pixels_of_one, count;
};

template <class T, int V>
struct PieceStats {
  using A = acc_t<T>;
  static constexpr int kThreads = spade::cuda::kThreads;
  ChannelStatsParams p;
  Pieces pieces;
  A* parts;

  struct Shared {
    SharedStats<A, V, kThreads> of_threads;
    SharedStats<A, 1, kThreads> of_groups;
  };

  // For the merge, a thread has one channel of its lane, and every `groups`-th row. It first merges these rows, which
  // leaves V times fewer rows and needs no other thread.
  struct Merger {
    static_assert(kThreads / kPieceLanes >= V, "a block has a row for every channel of a lane");
    uint32_t groups, channel, group;

    SPADE_DEVICE explicit Merger(const Thread& t)
        : groups(t.block_y / V), channel(t.row / groups), group(t.row % groups) {}
  };

  // The value nearest to 0 among the first pixels, channel by channel, so that an outlier does not become the origin.
  static SPADE_DEVICE Values<T, V> nearest_to_0(const Values<T, V>* x, int count) {
    Values<T, V> nearest = x[0];
#pragma unroll
    for (int b = 1; b < kCandidates; ++b)
#pragma unroll
      for (int i = 0; i < V; ++i) {
        if (b < count && std::abs(static_cast<A>(x[b].at[i])) < std::abs(static_cast<A>(nearest.at[i])))
          nearest.at[i] = x[b].at[i];
      }
    return nearest;
  }

  // The sum of a few 16-bit numbers is exact in float, or they lie too far apart for rounding to matter: they are added
  // as they are, and the origin is subtracted from the sum. If the compiler knows `count`, no conditions remain.
  static SPADE_DEVICE StatsFromOrigin<A, V> of_batch(const Values<T, V>& origins, const Values<T, V>* x, int count) {
    constexpr bool kExact = sizeof(T) == 2;
    StatsFromOrigin<A, V> batch;
    batch.count = static_cast<A>(count);
    const A scale = 1 / batch.count;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const A origin = static_cast<A>(origins.at[i]);
      A d[kBatch], sum = 0;
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        d[b] = b < count ? static_cast<A>(x[b].at[i]) - (kExact ? 0 : origin) : 0;
        sum = b == 0 ? d[b] : sum + d[b];
      }
      batch.mean[i] = (kExact ? sum - batch.count * origin : sum) * scale;
      const A centre = kExact ? origin + batch.mean[i] : batch.mean[i];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const A deviation = b < count ? d[b] - centre : 0;
        batch.m2[i] += deviation * deviation;
      }
    }
    return batch;
  }

  SPADE_DEVICE Stats<A, V> of_thread(const Thread& t, int64_t channel) const {
    const int64_t first = t.x * pieces.pixels_of_one;
    const auto pixels = static_cast<uint32_t>(min(p.pixels - first, pieces.pixels_of_one));
    if (t.row >= pixels) return {};
    const int64_t step = t.block_y * p.channels;
    const T* from = static_cast<const T*>(p.x) + (t.z * p.pixels + first + t.row) * p.channels + channel;
    Values<T, V> origin;
    StatsFromOrigin<A, V> total;
    const auto add = [&](int count) {
      Values<T, V> x[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b, from += step)
        if (b < count) x[b].load(from, 0);
      if (total.count == 0) origin = nearest_to_0(x, count);
      total.merge(of_batch(origin, x, count));
    };
    int left = static_cast<int>((pixels - t.row + t.block_y - 1) / t.block_y);
#pragma unroll 1
    for (; left >= kBatch; left -= kBatch) add(kBatch);
    if (left > 0) add(left);
    Stats<A, V> found;
    found.count = total.count;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      found.set_mean(i, static_cast<A>(origin.at[i]), total.mean[i]);
      found.m2[i] = total.m2[i];
    }
    return found;
  }

  SPADE_DEVICE void operator()(const Block& block, Shared& shared) const {
    block.phase([&](const Thread& t) {
      const int64_t channel = (static_cast<int64_t>(t.y) * t.block_x + t.lane) * V;
      shared.of_threads.put(t.row * t.block_x + t.lane, channel < p.channels ? of_thread(t, channel) : Stats<A, V>{});
    });
    block.phase([&](const Thread& t) {
      const Merger merger(t);
      Stats<A, 1> total;
      if (merger.channel < V) {
        total = shared.of_threads.get_one(merger.group * t.block_x + t.lane, merger.channel);
        for (uint32_t row = merger.group + merger.groups; row < t.block_y; row += merger.groups)
          total.merge(shared.of_threads.get_one(row * t.block_x + t.lane, merger.channel));
      }
      shared.of_groups.put(t.row * t.block_x + t.lane, total);
    });
    shared.of_groups.merge_rows(block, block.block_y / V);
    block.phase([&](const Thread& t) {
      const Merger merger(t);
      const int64_t channel = (static_cast<int64_t>(t.y) * t.block_x + t.lane) * V + merger.channel;
      if (merger.group != 0 || merger.channel >= V || channel >= p.channels) return;
      const Stats<A, 1> stats = shared.of_groups.get(t.row * t.block_x + t.lane);
      A* to = parts + (t.z * pieces.count + t.x) * 3 * p.channels + channel;
      to[0] = stats.mean[0];
      to[p.channels] = stats.rest[0];
      to[2 * p.channels] = stats.m2[0];
    });
  }
};

template <class T>
struct MergePieces {
  using A = acc_t<T>;
  static constexpr uint32_t kRows = 128 / sizeof(A);  // up to 1024 threads, which have 64 registers each
  static constexpr int kThreads = kMergeLanes * kRows;
  using Shared = SharedStats<A, 1, kThreads>;
  ChannelStatsParams p;
  Pieces pieces;
  const A* parts;

  SPADE_DEVICE void operator()(const Block& block, Shared& shared) const {
    block.phase([&](const Thread& t) {
      const int64_t channel = static_cast<int64_t>(t.x) * t.block_x + t.lane;
      Stats<A, 1> total;
      if (channel < p.channels)
        for (int64_t piece = t.row; piece < pieces.count; piece += t.block_y) {
          const A* from = parts + (t.y * pieces.count + piece) * 3 * p.channels + channel;
          Stats<A, 1> stats;
          stats.count = static_cast<A>(min(pieces.pixels_of_one, p.pixels - piece * pieces.pixels_of_one));
          stats.mean[0] = load_constant(from);
          stats.rest[0] = load_constant(from + p.channels);
          stats.m2[0] = load_constant(from + 2 * p.channels);
          if (piece == t.row)
            total = stats;
          else
            total.merge(stats);
        }
      shared.put(t.row * t.block_x + t.lane, total);
    });
    shared.merge_rows(block, block.block_y);
    block.phase([&](const Thread& t) {
      const int64_t channel = static_cast<int64_t>(t.x) * t.block_x + t.lane;
      if (t.row != 0 || channel >= p.channels) return;
      static_cast<A*>(p.mean)[t.y * p.channels + channel] = shared.mean[0][t.lane] + shared.rest[0][t.lane];
      static_cast<A*>(p.m2)[t.y * p.channels + channel] = shared.m2[0][t.lane];
    });
  }
};

// d x = grad_mean / pixels + 2 grad_m2 (x - mean).
template <class T, int V>
struct Gradient {
  using A = acc_t<T>;
  static constexpr int kThreads = spade::cuda::kThreads;
  ChannelStatsGradParams p;

  SPADE_DEVICE void operator()(const Thread& t) const {
    const int64_t channel = (static_cast<int64_t>(t.y) * t.block_x + t.lane) * V;
    const int64_t pixel = static_cast<int64_t>(t.x) * t.block_y + t.row;
    if (channel >= p.channels || pixel >= p.pixels) return;
    const int64_t of_image = t.z * p.channels + channel, at = (t.z * p.pixels + pixel) * p.channels + channel;
    Values<A, V> mean, grad_mean, grad_m2;
    mean.load(p.mean, of_image);
    grad_mean.load(p.grad_mean, of_image);
    grad_m2.load(p.grad_m2, of_image);
    Values<T, V> x;
    x.load(p.x, at);
#pragma unroll
    for (int i = 0; i < V; ++i)
      x.at[i] = static_cast<T>(grad_mean.at[i] / static_cast<A>(p.pixels) +
                               2 * grad_m2.at[i] * (static_cast<A>(x.at[i]) - mean.at[i]));
    x.store(p.out, at);
  }
};

template <class T, int V>
Grid over_pieces(const ChannelStatsParams& p, Pieces& pieces) {
  Grid grid = grid_over(ceil_div(p.channels, V), kPieceLanes, p.images);
  pieces.pixels_of_one = static_cast<int64_t>(grid.block_y) * kMostPixels;
  while (pieces.pixels_of_one > grid.block_y * kBatch &&
         ceil_div(p.pixels, pieces.pixels_of_one) * grid.y * grid.z < kWantedBlocks)
    pieces.pixels_of_one /= 2;
  pieces.count = ceil_div(p.pixels, pieces.pixels_of_one);
  grid.x = static_cast<uint32_t>(pieces.count);
  return grid;
}

// Calls f(T, V, grid, pieces) for the arguments of a call.
template <class F>
void for_call(Dtype dtype, const ChannelStatsParams& p, const F& f) {
  for_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    for_vector<T>(p.channels, {p.x}, [&](auto v) {
      Pieces pieces;
      const Grid grid = over_pieces<T, v()>(p, pieces);
      f(type, v, grid, pieces);
    });
  });
}

}  // namespace

// The size of the scratch that channel_stats needs, in values of the accumulation type.
int64_t channel_stats_parts(Dtype dtype, const ChannelStatsParams& p) {
  int64_t count = 0;
  for_call(dtype, p, [&](auto, auto, Grid, Pieces pieces) { count = p.images * pieces.count * 3 * p.channels; });
  return count;
}

void channel_stats(Dtype dtype, const ChannelStatsParams& p, void* scratch, cudaStream_t stream) {
  for_call(dtype, p, [&](auto type, auto v, Grid grid, Pieces pieces) {
    using T = typename decltype(type)::type;
    using A = acc_t<T>;
    A* parts = static_cast<A*>(scratch);
    launch(grid, stream, PieceStats<T, v()>{p, pieces, parts});
    const Grid merge{static_cast<uint32_t>(ceil_div(p.channels, kMergeLanes)), static_cast<uint32_t>(p.images), 1,
                     kMergeLanes, MergePieces<T>::kRows};
    launch(merge, stream, MergePieces<T>{p, pieces, parts});
  });
}

void channel_stats_grad(Dtype dtype, const ChannelStatsGradParams& p, cudaStream_t stream) {
  for_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    for_vector<T>(p.channels, {p.x, p.mean, p.grad_mean, p.grad_m2, p.out}, [&](auto v) {
      Grid grid = grid_over(ceil_div(p.channels, v()), 32, p.images);
      grid.x = static_cast<uint32_t>(ceil_div(p.pixels, grid.block_y));
      launch(grid, stream, Gradient<T, v()>{p});
    });
  });
}

namespace {

std::tuple<Tensor, Tensor> channel_stats_op(const Tensor& x_in) {
  check_channel_stats(x_in);
  const Launch launch(x_in);
  const Tensor x = channels_last(x_in);
  const ScalarType acc = accumulator(x);
  const Tensor mean = torch::stable::new_empty(x, {x.size(0), x.size(1)}, acc);
  const Tensor m2 = torch::stable::empty_like(mean);
  const ChannelStatsParams params{x.const_data_ptr(), mean.mutable_data_ptr(), m2.mutable_data_ptr(),
                                  x.size(0),          x.size(2) * x.size(3),   x.size(1)};
  const Tensor parts = torch::stable::new_empty(x, {channel_stats_parts(dtype_of(x), params)}, acc);
  channel_stats(dtype_of(x), params, parts.mutable_data_ptr(), launch.stream());
  launch.check();
  return {mean, m2};
}

Tensor channel_stats_grad_op(const Tensor& x_in, const Tensor& mean_in, const Tensor& grad_mean_in,
                             const Tensor& grad_m2_in) {
  check_channel_stats_grad(x_in, mean_in, grad_mean_in, grad_m2_in);
  const Launch launch(x_in);
  const Tensor x = channels_last(x_in);
  const ScalarType acc = accumulator(x);
  const Tensor mean = dense(mean_in, acc), grad_mean = dense(grad_mean_in, acc), grad_m2 = dense(grad_m2_in, acc);
  const Tensor out = empty_channels_last(x);
  channel_stats_grad(dtype_of(x),
                     {x.const_data_ptr(), mean.const_data_ptr(), grad_mean.const_data_ptr(), grad_m2.const_data_ptr(),
                      out.mutable_data_ptr(), x.size(0), x.size(2) * x.size(3), x.size(1)},
                     launch.stream());
  launch.check();
  Tensor like_x = torch::stable::empty_like(x_in);
  if (like_x.stride(1) == out.stride(1) && like_x.stride(3) == out.stride(3)) return out;
  return torch::stable::copy_(like_x, out);
}

}  // namespace
}  // namespace spade::cuda

STABLE_TORCH_LIBRARY_IMPL(spade_kernels, SPADE_DISPATCH_KEY, m) {
  m.impl("channel_stats", TORCH_BOX(&spade::cuda::channel_stats_op));
  m.impl("channel_stats_grad", TORCH_BOX(&spade::cuda::channel_stats_grad_op));
}
