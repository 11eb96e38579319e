// Segment sums in a fixed order: long segments are cut into pieces, and the pieces' sums are added in order.
#pragma once

#include "vector.h"

namespace spade {

// sums[s] (width values) = the sum of segment s. `add(begin, end, sum)` writes the sum of the entries [begin, end).
template <class A, class Add>
void sum_segments(int64_t num_segments, const int64_t* starts, int64_t piece, int64_t width, A* sums, const Add& add) {
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
    const int64_t count = (starts[s + 1] - starts[s] + piece - 1) / piece;
    if (count <= 1) continue;
    longs.push_back({s, num_partial, count});
    num_partial += count;
  }
  std::vector<A> partial(num_partial * width);
  size_t next_long = 0;
  for (int64_t s = 0; s < num_segments; ++s) {
    const bool is_long = next_long < longs.size() && longs[next_long].segment == s;
    if (!is_long) {
      pieces.push_back({starts[s], starts[s + 1], sums + s * width});
      continue;
    }
    const Long& cut = longs[next_long++];
    for (int64_t i = 0; i < cut.count; ++i) {
      const int64_t begin = starts[s] + i * piece;
      pieces.push_back({begin, std::min(begin + piece, starts[s + 1]), partial.data() + (cut.first + i) * width});
    }
  }
  in_pieces(pieces.size(), 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) add(pieces[i].begin, pieces[i].end, pieces[i].sum);
  });
  in_pieces(longs.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      A* sum = sums + longs[i].segment * width;
      std::fill_n(sum, width, A(0));
      for (int64_t j = 0; j < longs[i].count; ++j) {
        const A* from = partial.data() + (longs[i].first + j) * width;
        for (int64_t c = 0; c < width; ++c) sum[c] += from[c];
      }
    }
  });
}

}  // namespace spade
