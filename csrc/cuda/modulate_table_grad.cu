// The gradient of the table: sums over the pixels of each row. The rows' numbers of pixels are extremely uneven, so the
// list of all pixels, grouped by row, is cut into equal pieces without regard to rows. If a row is within one piece, it
// is summed there. A row that crosses cuts leaves one part in each of its pieces, and the parts are then added in
// order.
#include "pixels.h"

namespace spade::cuda {
namespace {

constexpr int kLoads = 4;                             // pixels in flight together
constexpr int kLongestPiece = 6, kShortestPiece = 3;  // binary logarithms of pixels
constexpr int64_t kWantedThreads = 65536;
constexpr int64_t kPartLanes = 8;  // narrow blocks have more rows of threads, which share a long row

// The cut of `entries` pixels. Parts are (pieces, 2, 2 * channels). Part 0 of a piece belongs to the row that begins
// before the piece; part 1 belongs to the row that begins in it and ends after it.
struct Cut {
  int64_t entries, pieces;
  int piece_bits;
};

template <class A>
SPADE_DEVICE A* part_of(const ModulateParams& p, A* parts, int64_t piece, int which) {
  return parts + (piece * 2 + which) * 2 * p.channels;
}

template <class T, class S, int V, int upsample>
struct SumPieces {
  using A = acc_t<T>;
  static constexpr int kThreads = spade::cuda::kThreads;
  ModulateParams p;
  Cut cut;
  A* parts;

  SPADE_DEVICE int64_t source_of(uint32_t pixel) const {
    if constexpr (upsample == 1) return pixel;
    const uint32_t width = 2 * static_cast<uint32_t>(p.width), y = pixel / width, x = pixel - y * width;
    // Two rows of y belong to one row of x; this is true across images, too.
    return static_cast<int64_t>(y / 2) * p.width + x / 2;
  }

  SPADE_DEVICE void write(const Values<A, V>& d_scale, const Values<A, V>& d_shift, int64_t row, int64_t piece,
                          int64_t channel) const {
    A* to = static_cast<A*>(p.out) + row * 2 * p.channels;
    if (p.pixel_row) {
      if (load_constant(p.offsets + row) < piece << cut.piece_bits)
        to = part_of(p, parts, piece, 0);
      else if (load_constant(p.offsets + row + 1) > (piece + 1) << cut.piece_bits)
        to = part_of(p, parts, piece, 1);
    }
    d_scale.store(to, channel);
    d_shift.store(to, p.channels + channel);
  }

  SPADE_DEVICE void operator()(const Thread& t) const {
    const int64_t channel = (static_cast<int64_t>(t.y) * t.block_x + t.lane) * V;
    const int64_t piece = static_cast<int64_t>(t.x) * t.block_y + t.row, begin = piece << cut.piece_bits;
    const int64_t end = min((piece + 1) << cut.piece_bits, cut.entries);
    if (channel >= p.channels || begin >= end) return;
    const A negative_slope = static_cast<A>(p.negative_slope);
    const uint32_t pixels = static_cast<uint32_t>(p.height * p.width * upsample * upsample);
    int64_t current = -1;
    uint32_t image_begin = 0;
    Statistics<A, V> stats;
    Row<S, V> row;
    Values<A, V> d_scale{}, d_shift{};
    for (int64_t e = begin; e < end; e += kLoads) {
      uint32_t pixel[kLoads], rows[kLoads];
      Values<T, V> x[kLoads], grad[kLoads];
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const int64_t entry = min(e + i, end - 1);  // past the end, any entry will do
        pixel[i] = static_cast<uint32_t>(p.pixel_row ? load_constant(p.indices + entry) : entry);
      }
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        rows[i] = static_cast<uint32_t>(row_of(p, pixel[i]));
        x[i].load(p.x, source_of(pixel[i]) * p.channels + channel);
        grad[i].load(p.grad, pixel[i] * p.channels + channel);
      }
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        if (e + i >= end) continue;
        if (current < 0 || pixel[i] - image_begin >= pixels) {
          const uint32_t image = pixel[i] / pixels;
          image_begin = image * pixels;
          stats.load(p, image, channel);
        }
        if (rows[i] != current) {
          if (current >= 0) write(d_scale, d_shift, current, piece, channel);
          current = rows[i];
          row.load(p, current, channel);
          d_scale = d_shift = Values<A, V>{};
        }
#pragma unroll
        for (int c = 0; c < V; ++c) {
          const A xhat = stats.xhat(x[i], c), dy = static_cast<A>(grad[i].at[c]);
          const A d = row.apply(xhat, c) > 0 ? dy : dy * negative_slope;
          d_scale.at[c] += d * xhat;
          d_shift.at[c] += d;
        }
      }
    }
    write(d_scale, d_shift, current, piece, channel);
  }
};

// Adds the parts of every row that crosses a cut, on the threads of the piece where the row starts. A row without
// pixels becomes 0. Here `channel` counts scale and shift.
template <class A, int V>
struct MergeParts {
  static constexpr int kThreads = spade::cuda::kThreads;
  struct Shared {
    int64_t first, last, row;  // row: the long row that starts in this block's pieces, or -1; first, last: its pieces
    Values<A, V> sums[kThreads];
  };
  ModulateParams p;
  Cut cut;
  A* parts;
  int64_t threads;  // threads of the launch for one group of columns

  // The sum of the parts of pieces first, first + step, .. up to last: part 1 of piece `start`, part 0 of all others.
  SPADE_DEVICE Values<A, V> sum(int64_t start, int64_t first, int64_t last, int64_t step, int64_t channel) const {
    Values<A, V> sum{};
#pragma unroll 4
    for (int64_t piece = first; piece <= last; piece += step) {
      Values<A, V> part;
      part.load(part_of(p, parts, piece, piece == start), channel);
#pragma unroll
      for (int c = 0; c < V; ++c) sum.at[c] += part.at[c];
    }
    return sum;
  }

  SPADE_DEVICE void operator()(const Block& block, Shared& shared) const {
    const int64_t width = 2 * p.channels;
    const auto channel_of = [&](const Thread& t) { return (static_cast<int64_t>(t.y) * t.block_x + t.lane) * V; };
    block.phase([&](const Thread& t) {
      if (t.row == 0 && t.lane == 0) shared.row = -1;
    });
    block.phase([&](const Thread& t) {
      const int64_t piece = static_cast<int64_t>(t.x) * t.block_y + t.row, end = (piece + 1) << cut.piece_bits;
      if (end >= cut.entries || channel_of(t) >= width) return;
      const int64_t row = load_constant(p.pixel_row + load_constant(p.indices + end - 1));
      const int64_t row_end = load_constant(p.offsets + row + 1);
      if (row_end <= end || load_constant(p.offsets + row) < piece << cut.piece_bits) return;
      const int64_t last = (row_end - 1) >> cut.piece_bits;
      // Another row cannot start before this one's last piece, so a block has at most one row that reaches past its
      // pieces.
      if (last - piece < t.block_y) {
        sum(piece, piece, last, 1, channel_of(t)).store(p.out, row * width + channel_of(t));
      } else if (t.lane == 0) {
        shared.row = row;
        shared.first = piece;
        shared.last = last;
      }
    });
    block.phase([&](const Thread& t) {
      for (int64_t row = (static_cast<int64_t>(t.x) * t.block_y + t.row) * t.block_x + t.lane; row < p.num_rows;
           row += threads) {
        if (load_constant(p.offsets + row) != load_constant(p.offsets + row + 1)) continue;
        const int64_t begin = static_cast<int64_t>(t.y) * t.block_x * V;
        for (int64_t channel = begin; channel < min(begin + t.block_x * V, width); channel += V)
          Values<A, V>{}.store(p.out, row * width + channel);
      }
    });
    if (shared.row < 0) return;
    block.phase([&](const Thread& t) {
      if (channel_of(t) < width)
        shared.sums[t.row * t.block_x + t.lane] =
            sum(shared.first, shared.first + t.row, shared.last, t.block_y, channel_of(t));
    });
    for (uint32_t step = 1; step < block.block_y; step *= 2)
      block.phase([&](const Thread& t) {
        if (t.row % (2 * step) != 0 || t.row + step >= t.block_y || channel_of(t) >= width) return;
        const uint32_t thread = t.row * t.block_x + t.lane;
#pragma unroll
        for (int c = 0; c < V; ++c) shared.sums[thread].at[c] += shared.sums[thread + step * t.block_x].at[c];
      });
    block.phase([&](const Thread& t) {
      if (t.row == 0 && channel_of(t) < width) shared.sums[t.lane].store(p.out, shared.row * width + channel_of(t));
    });
  }
};

// Shortens the pieces until there are enough threads, if there are enough pixels.
Cut cut_of(const ModulateParams& p, int64_t vectors) {
  Cut cut{p.images * p.height * p.width * p.upsample * p.upsample, 1, kLongestPiece};
  while (cut.piece_bits > kShortestPiece && (cut.entries >> cut.piece_bits) * vectors < kWantedThreads)
    --cut.piece_bits;
  cut.pieces = std::max<int64_t>(ceil_div(cut.entries, int64_t{1} << cut.piece_bits), 1);
  return cut;
}

// Calls f(Type<T>, Type<S>, V, upsample, cut) for the arguments of a call.
template <class F>
void for_call(Dtype dtype, Dtype table, const ModulateParams& p, const F& f) {
  for_modulate(dtype, table, p, [&](auto type, auto table_type, auto v, auto upsample) {
    f(type, table_type, v, upsample, cut_of(p, ceil_div(p.channels, v())));
  });
}

}  // namespace

int64_t modulate_table_grad_parts(Dtype dtype, Dtype table, const ModulateParams& p) {
  int64_t count = 0;
  for_call(dtype, table, p, [&](auto, auto, auto, auto, Cut cut) { count = cut.pieces * 4 * p.channels; });
  return p.pixel_row ? count : 0;
}

void modulate_table_grad(Dtype dtype, Dtype table, const ModulateParams& p, void* scratch, cudaStream_t stream) {
  for_call(dtype, table, p, [&](auto type, auto table_type, auto v, auto upsample, Cut cut) {
    using T = typename decltype(type)::type;
    using S = typename decltype(table_type)::type;
    using A = acc_t<T>;
    A* parts = static_cast<A*>(scratch);
    Grid grid = grid_over(ceil_div(p.channels, v()), kMostLanes, 1);
    grid.x = static_cast<uint32_t>(ceil_div(cut.pieces, grid.block_y));
    launch(grid, stream, SumPieces<T, S, v(), upsample()>{p, cut, parts});
    if (!p.pixel_row) return;
    for_vector<A>(2 * p.channels, {p.out}, [&](auto wide) {
      Grid merge = grid_over(ceil_div(2 * p.channels, wide()), kPartLanes, 1);
      merge.x = static_cast<uint32_t>(ceil_div(cut.pieces, merge.block_y));
      launch(merge, stream, MergeParts<A, wide()>{p, cut, parts, int64_t{merge.x} * merge.block_y * merge.block_x});
    });
  });
}

}  // namespace spade::cuda
