// Sums over rows of a table: the forward of gather_sum, and the segment sum of every backward.
#include "kernels.h"
#include "segments.h"

namespace spade {
namespace {

constexpr int64_t kBlock = 64;  // columns held in registers while the taps are added
constexpr int64_t kRowPiece = 64;
constexpr int64_t kValuePiece = 8192;
constexpr int64_t kSegmentPiece = 256;  // entries summed in one go; longer segments are cut

template <class A>
SPADE_INLINE void add_taps(const GatherSumParams& p, int64_t begin, int64_t end) {
  const A* taps = static_cast<const A*>(p.taps);
  const A* bias = static_cast<const A*>(p.bias);
  for (int64_t r = begin; r < end; ++r) {
    const int64_t* window = p.windows + r * p.num_taps;
    A* out = static_cast<A*>(p.rows) + r * p.width;
    for (int64_t c = 0; c < p.width; c += kBlock) {
      const int64_t n = std::min(kBlock, p.width - c);
      A sum[kBlock] = {};
      for (int64_t t = 0; t < p.num_taps; ++t) {
        const A* tap = taps + (window[t] * p.num_taps + t) * p.width + c;
        if (n == kBlock)
          for (int64_t i = 0; i < kBlock; ++i) sum[i] += tap[i];
        else
          for (int64_t i = 0; i < n; ++i) sum[i] += tap[i];
      }
      for (int64_t i = 0; i < n; ++i) {
        const A value = bias ? sum[i] + bias[c + i] : sum[i];
        // Written so that NaN stays NaN.
        out[c + i] = p.relu && value < 0 ? A(0) : value;
      }
    }
  }
}

SPADE_TARGET_CLONES void add_taps_f32(const GatherSumParams& p, int64_t begin, int64_t end) {
  add_taps<float>(p, begin, end);
}
SPADE_TARGET_CLONES void add_taps_f64(const GatherSumParams& p, int64_t begin, int64_t end) {
  add_taps<double>(p, begin, end);
}

template <class A>
SPADE_INLINE void add_entries(const SegmentSumParams& p, int64_t begin, int64_t end, A* sum) {
  sum_in_blocks(begin, end, p.width, sum, [&](int64_t e, A* to) {
    const A* value = static_cast<const A*>(p.values) + (p.indices ? p.indices[e] / p.divisor : e) * p.row;
    for (int64_t i = 0; i < p.width; ++i) to[i] += value[i];
  });
}

SPADE_TARGET_CLONES void add_entries_f32(const SegmentSumParams& p, int64_t begin, int64_t end, float* sum) {
  add_entries<float>(p, begin, end, sum);
}
SPADE_TARGET_CLONES void add_entries_f64(const SegmentSumParams& p, int64_t begin, int64_t end, double* sum) {
  add_entries<double>(p, begin, end, sum);
}

template <class A>
SPADE_INLINE void keep_positive(const A* condition, const A* values, int64_t count, A* out) {
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) out[i] = condition[i] > 0 ? values[i] : A(0);
}

SPADE_TARGET_CLONES void keep_positive_any(const float* condition, const float* values, int64_t count, float* out) {
  keep_positive(condition, values, count, out);
}
SPADE_TARGET_CLONES void keep_positive_any(const double* condition, const double* values, int64_t count, double* out) {
  keep_positive(condition, values, count, out);
}

template <class A>
void where_positive(const void* condition, const void* values, int64_t count, void* out) {
  parallel_for_chunks(count, kValuePiece, [&](int64_t begin, int64_t end) {
    keep_positive_any(static_cast<const A*>(condition) + begin, static_cast<const A*>(values) + begin, end - begin,
                      static_cast<A*>(out) + begin);
  });
}

}  // namespace

void where_positive(Dtype dtype, const void* condition, const void* values, int64_t count, void* out) {
  dtype == Dtype::f64 ? where_positive<double>(condition, values, count, out)
                      : where_positive<float>(condition, values, count, out);
}

void gather_sum(Dtype dtype, const GatherSumParams& p) {
  parallel_for_chunks(p.num_rows, kRowPiece, [&](int64_t begin, int64_t end) {
    dtype == Dtype::f64 ? add_taps_f64(p, begin, end) : add_taps_f32(p, begin, end);
  });
}

void segment_sum(Dtype dtype, const SegmentSumParams& p) {
  if (dtype == Dtype::f64)
    sum_segments(p.num_segments, p.offsets, kSegmentPiece, p.width, static_cast<double*>(p.sums),
                 [&](int64_t begin, int64_t end, double* sum) { add_entries_f64(p, begin, end, sum); });
  else
    sum_segments(p.num_segments, p.offsets, kSegmentPiece, p.width, static_cast<float*>(p.sums),
                 [&](int64_t begin, int64_t end, float* sum) { add_entries_f32(p, begin, end, sum); });
}

}  // namespace spade
