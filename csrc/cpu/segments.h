// Segment sums in a fixed order: long segments are cut into pieces, and the pieces' sums are added in order.
#pragma once

#include "../dtype.h"
#include "scratch.h"
#include "vector.h"

namespace spade {

// sums[s] = sum over the entries e of segment s of values[e / divisor], all in acc.
struct SegmentSumParams {
  const void* values;      // rows of `width` values, `row` apart
  const int64_t* indices;  // null: entry e is e
  const int64_t* offsets;  // (num_segments + 1)
  void* sums;              // (num_segments, width)
  int64_t num_segments, width, row, divisor;
};

void segment_sum(Dtype dtype, const SegmentSumParams& params);

// Calls `add(e, to)` for e in [begin, end), which adds entry e to `to`, and writes the total to sum (width values).
// Entries are summed within blocks, and then over blocks: rounding errors grow with the sum of the two counts instead
// of their product.
template <class A, class Add>
SPADE_INLINE void sum_in_blocks(int64_t begin, int64_t end, int64_t width, A* sum, const Add& add) {
  constexpr int64_t kBlock = 16;
  std::fill_n(sum, width, A(0));
  if (end - begin <= kBlock) {
    for (int64_t e = begin; e < end; ++e) add(e, sum);
    return;
  }
  const Scratch<A> block(width);
  for (int64_t b = begin; b < end; b += kBlock) {
    std::fill_n(block.data(), width, A(0));
    for (int64_t e = b; e < std::min(b + kBlock, end); ++e) add(e, block.data());
    for (int64_t i = 0; i < width; ++i) sum[i] += block.data()[i];
  }
}

// sums[s] (width values) = the sum of segment s. `add(begin, end, sum)` writes the sum of the entries [begin, end).
template <class A, class Add>
void sum_segments(int64_t num_segments, const int64_t* offsets, int64_t piece, int64_t width, A* sums, const Add& add) {
  struct Piece {
    int64_t begin, end;
    A* sum;
  };
  struct Long {
    int64_t segment, first, count;
  };
  std::vector<Piece> pieces;
  std::vector<Long> longs;
  int64_t num_partial = 0;
  for (int64_t s = 0; s < num_segments; ++s) {
    const int64_t count = (offsets[s + 1] - offsets[s] + piece - 1) / piece;
    if (count <= 1) continue;
    longs.push_back({s, num_partial, count});
    num_partial += count;
  }
  std::vector<A> partial(num_partial * width);
  size_t next_long = 0;
  for (int64_t s = 0; s < num_segments; ++s) {
    const bool is_long = next_long < longs.size() && longs[next_long].segment == s;
    if (!is_long) {
      pieces.push_back({offsets[s], offsets[s + 1], sums + s * width});
      continue;
    }
    const Long& cut = longs[next_long++];
    for (int64_t i = 0; i < cut.count; ++i) {
      const int64_t begin = offsets[s] + i * piece;
      pieces.push_back({begin, std::min(begin + piece, offsets[s + 1]), partial.data() + (cut.first + i) * width});
    }
  }
  parallel_for_chunks(pieces.size(), 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) add(pieces[i].begin, pieces[i].end, pieces[i].sum);
  });
  parallel_for_chunks(longs.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const A* first = partial.data() + longs[i].first * width;
      sum_in_blocks(0, longs[i].count, width, sums + longs[i].segment * width, [&](int64_t j, A* to) {
        for (int64_t c = 0; c < width; ++c) to[c] += first[j * width + c];
      });
    }
  });
}

}  // namespace spade
