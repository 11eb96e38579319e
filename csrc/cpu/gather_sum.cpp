// Sums over rows of a table: the forward of gather_sum, and the segment sum of every backward.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../arguments.h"
#include "calls.h"
#include "segments.h"

namespace spade {
namespace {

// rows[r] = act(bias + sum over t of tap_responses[windows[r, t], t]).
struct GatherSumParams {
  const void* tap_responses;  // (codes, num_taps, width), acc
  const void* bias;           // (width), acc, or null
  const int64_t* windows;     // (rows, num_taps)
  void* rows;                 // (rows, width), acc
  int64_t num_rows, num_taps, width;
  bool relu;
};

constexpr int64_t kBlock = 64;  // columns held in registers while the taps are added
constexpr int64_t kRowPiece = 64;
constexpr int64_t kValuePiece = 8192;
constexpr int64_t kSegmentPiece = 256;  // entries summed in one go; longer segments are cut

template <class A>
SPADE_INLINE void add_taps(const GatherSumParams& p, int64_t begin, int64_t end) {
  const A* tap_responses = static_cast<const A*>(p.tap_responses);
  const A* bias = static_cast<const A*>(p.bias);
  for (int64_t r = begin; r < end; ++r) {
    const int64_t* window = p.windows + r * p.num_taps;
    A* out = static_cast<A*>(p.rows) + r * p.width;
    for (int64_t c = 0; c < p.width; c += kBlock) {
      const int64_t n = std::min(kBlock, p.width - c);
      A sum[kBlock] = {};
      for (int64_t t = 0; t < p.num_taps; ++t) {
        const A* tap = tap_responses + (window[t] * p.num_taps + t) * p.width + c;
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

void gather_sum(Dtype dtype, const GatherSumParams& p) {
  parallel_for_chunks(p.num_rows, kRowPiece, [&](int64_t begin, int64_t end) {
    dtype == Dtype::f64 ? add_taps_f64(p, begin, end) : add_taps_f32(p, begin, end);
  });
}

}  // namespace

void segment_sum(Dtype dtype, const SegmentSumParams& p) {
  if (dtype == Dtype::f64)
    sum_segments(p.num_segments, p.offsets, kSegmentPiece, p.width, static_cast<double*>(p.sums),
                 [&](int64_t begin, int64_t end, double* sum) { add_entries_f64(p, begin, end, sum); });
  else
    sum_segments(p.num_segments, p.offsets, kSegmentPiece, p.width, static_cast<float*>(p.sums),
                 [&](int64_t begin, int64_t end, float* sum) { add_entries_f32(p, begin, end, sum); });
}

namespace {

Tensor where_positive(const Tensor& condition, const Tensor& values) {
  const Tensor result = torch::stable::empty_like(values);
  const auto run = dtype_of(values) == Dtype::f64 ? where_positive<double> : where_positive<float>;
  run(condition.const_data_ptr(), values.const_data_ptr(), values.numel(), result.mutable_data_ptr());
  return result;
}

Tensor gather_sum_op(const Tensor& tap_responses_in, const MaybeTensor& bias_in, const Tensor& windows_in,
                     const MaybeTensor& indices, const MaybeTensor& offsets, bool relu) {
  const Arguments a("gather_sum", tap_responses_in);
  a.floats("tap_responses", tap_responses_in, {kNotEmpty, kNotEmpty, kNotEmpty});
  a.floats("bias", bias_in, {tap_responses_in.size(2)});
  a.index("windows", windows_in, {size_of(windows_in, 0), tap_responses_in.size(1)}, 0, tap_responses_in.size(0));
  a.segments(indices, offsets, tap_responses_in.size(0) * tap_responses_in.size(1), windows_in.numel());
  const ScalarType acc = accumulator(tap_responses_in);
  const Tensor tap_responses = dense(tap_responses_in, acc), windows = dense(windows_in);
  const MaybeTensor bias = dense(bias_in, acc);
  const Tensor rows = torch::stable::new_empty(tap_responses, {windows.size(0), tap_responses.size(2)});
  gather_sum(dtype_of(rows), {tap_responses.const_data_ptr(), data(bias), ids(windows), rows.mutable_data_ptr(),
                              windows.size(0), windows.size(1), tap_responses.size(2), relu});
  return dense(rows, tap_responses_in.scalar_type());
}

std::tuple<Tensor, Tensor> gather_sum_grad_op(const Tensor& grad, const Tensor& rows, const Tensor& indices_in,
                                              const Tensor& offsets_in, int64_t num_taps, bool relu) {
  const Arguments a("gather_sum_grad", grad);
  a.integer("num_taps", num_taps, 1, kMostEntries);
  a.floats("grad", grad, {size_of(grad, 0), kNotEmpty});
  a.floats("rows", rows, {grad.size(0), grad.size(1)});
  a.require(grad.size(0) <= kMostEntries / num_taps, "num_taps is too large for so many rows");
  const int64_t entries = grad.size(0) * num_taps, segments = size_of(offsets_in, 0) - 1;
  a.require(segments > 0 && segments % num_taps == 0, "offsets must have one value more than a multiple of num_taps");
  a.index("indices", indices_in, {entries}, 0, entries);
  // The backward of modulate sums over image_offsets here: spare rows of a static label map belong to no image.
  a.bounds("offsets", offsets_in, segments, entries, false);
  const ScalarType acc = accumulator(grad);
  const Tensor indices = dense(indices_in), offsets = dense(offsets_in);
  Tensor masked = dense(grad, acc);
  if (relu) masked = where_positive(dense(rows, acc), masked);
  const int64_t width = masked.size(1);
  const Tensor d_tap_responses = torch::stable::new_empty(masked, {segments / num_taps, num_taps, width});
  segment_sum(dtype_of(masked), {masked.const_data_ptr(), ids(indices), ids(offsets),
                                 d_tap_responses.mutable_data_ptr(), segments, width, width, num_taps});
  return {d_tap_responses, column_sum(masked, masked.size(0), width)};
}

}  // namespace
}  // namespace spade

STABLE_TORCH_LIBRARY_IMPL(spade_kernels, CPU, m) {
  m.impl("gather_sum", TORCH_BOX(&spade::gather_sum_op));
  m.impl("gather_sum_grad", TORCH_BOX(&spade::gather_sum_grad_op));
}
