// The kernels' parameters: pointers, sizes, and what the operator was asked for. No kernel knows about tensors.
//
// Tensors are dense. Pixel tensors are channels-last: element (n, pixel, c) at (n * pixels + pixel) * channels + c.
// "acc" is the accumulation type: double for double, float for everything else. Segments are `order, starts` pairs:
// segment s takes the entries order[starts[s]] .. order[starts[s + 1] - 1], in that order.
#pragma once

#include <cstdint>

namespace spade {

enum class Dtype { f32, f64, bf16, f16 };

// Distinct windows of one image. `ids` (height, width) holds positive numbers below 2^32; 0 stands for outside.
struct WindowIndexParams {
  const int64_t* ids;
  int64_t height, width, kernel_size, stride, padding;
  int64_t out_height, out_width;
};

// rows[r] = act(bias + sum over t of taps[windows[r, t] - first_id, t]), ids below first_id adding nothing.
struct SumOfTapsParams {
  const void* taps;        // (ids, num_taps, width), acc
  const void* bias;        // (width), acc, or null
  const int64_t* windows;  // (rows, num_taps)
  void* rows;              // (rows, width), acc
  int64_t num_rows, num_taps, width, first_id;
  bool relu;
};

// sums[s] = sum over the entries e of segment s of values[e / divisor], all in acc.
struct SegmentSumParams {
  const void* values;     // (count, width)
  const int64_t* order;   // null: entries stand in order
  const int64_t* starts;  // (num_segments + 1)
  void* sums;             // (num_segments, width)
  int64_t num_segments, width, divisor;
};

struct ChannelStatsParams {
  const void* x;
  void* mean;  // (images, channels), acc
  void* m2;    // (images, channels), acc: sum of squared deviations
  int64_t images, pixels, channels;
};

// The forward pass reads x; the backward passes read grad too.
struct ModulateParams {
  const void* x;
  const void* grad;          // of y
  const void* mean;          // (images or 1, channels), acc
  const void* rstd;          // the same
  const void* table;         // (rows, 2 * channels), acc: scale, shift
  const int64_t* pixel_row;  // (images * pixels), or null: every pixel its own row
  const int64_t* order;      // pixels of each row, for the table's gradient
  const int64_t* starts;
  const void* mean_shift;  // (images or 1, channels), acc, or null: see modulate_input_grad
  const void* mean_scale;
  void* out;  // y, the table's gradient (acc), or the gradient of x
  int64_t images, pixels, channels, num_rows;
  int64_t stats_stride, means_stride;  // 0 where one row of statistics serves all images, else channels
  double slope;
};

}  // namespace spade
