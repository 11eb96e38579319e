// The kernels' parameters: pointers, sizes, and what the operator was asked for. No kernel knows about tensors.
//
// Tensors are dense. Pixel tensors are channels-last: element (n, pixel, c) at (n * pixels + pixel) * channels + c.
// "acc" is the accumulation type: double for double, float for everything else. Segments are `indices, offsets` pairs:
// segment s takes the entries indices[offsets[s]] .. indices[offsets[s + 1] - 1], in that order.
#pragma once

#include <cstdint>

namespace spade {

// Packed weights stand in panels of this many output columns: (panels, taps, depth, kPanelColumns) for
// modulation_table, (points, panels, in, kPanelColumns) for convolutions, which have 1 point or, 3 x 3, kPoints.
constexpr int64_t kPanelColumns = 32, kPoints = 16;

enum class Dtype { f32, f64, bf16, f16 };

// Distinct windows of one image. `ids` (height, width) holds positive numbers below 2^32; 0 stands for outside.
struct WindowIndexParams {
  const int64_t* ids;
  int64_t height, width, kernel_size, stride, padding;
  int64_t out_height, out_width;
};

// rows[r] = act(bias + sum over t of taps[windows[r, t], t]).
struct GatherSumParams {
  const void* taps;        // (codes, num_taps, width), acc
  const void* bias;        // (width), acc, or null
  const int64_t* windows;  // (rows, num_taps)
  void* rows;              // (rows, width), acc
  int64_t num_rows, num_taps, width;
  bool relu;
};

// sums[s] = sum over the entries e of segment s of values[e / divisor], all in acc.
struct SegmentSumParams {
  const void* values;      // rows of `width` values, `row` apart
  const int64_t* indices;  // null: entries stand in order
  const int64_t* offsets;  // (num_segments + 1)
  void* sums;              // (num_segments, width)
  int64_t num_segments, width, row, divisor;
};

// The weights of the two convolutions, as one with 2 * channels outputs: scale, then shift. Both have the same strides.
struct ModulationWeights {
  const void* gamma;  // element (c, d, t) at c * channel + d * depth_step + t * tap, acc
  const void* beta;
  int64_t channels, depth, num_taps;
  int64_t channel, depth_step, tap;
};

// table[r] = bias + sum over t of hidden[windows[r, t] - 1] @ weights[t], a window entry of 0 adding nothing.
struct ModulationTableParams {
  const void* hidden;  // (num_hidden, depth), acc
  ModulationWeights weights;
  const void* panels;      // the weights as pack_modulation_weight lays them out, or null
  const void* bias;        // (2 * channels), acc
  const int64_t* windows;  // (num_rows, num_taps)
  void* table;             // (num_rows, 2 * channels), acc
  int64_t num_hidden, num_rows;
};

struct ModulationTableGradParams {
  const void* grad;    // (num_rows, 2 * channels), acc
  const void* hidden;  // (num_hidden, depth), acc
  ModulationWeights weights;
  const int64_t* indices;  // uses of each (hidden row, tap), see SegmentSumParams
  const int64_t* offsets;  // (num_hidden * num_taps + 1)
  void* d_hidden;          // like hidden
  void* d_gamma;           // (channels, depth, num_taps), dense
  void* d_beta;
  int64_t num_hidden;
};

struct ChannelStatsParams {
  const void* x;
  void* mean;  // (images, channels), acc
  void* m2;    // (images, channels), acc: sum of squared deviations
  int64_t images, pixels, channels;
};

// out = grad_mean / pixels + 2 * grad_m2 * (x - mean).
struct ChannelStatsGradParams {
  const void* x;
  const void* mean;  // (images, channels), acc, as the gradients are
  const void* grad_mean;
  const void* grad_m2;
  void* out;  // like x
  int64_t images, pixels, channels;
};

// The forward pass reads x; the backward passes read grad too. Every pixel of x stands for upsample x upsample pixels
// of y and grad, which pixel_row and indices count.
struct ModulateParams {
  const void* x;
  const void* grad;          // of y
  const void* mean;          // (images or 1, channels), acc
  const void* rstd;          // the same
  const void* table;         // (rows, 2 * channels), acc: scale, shift
  const int64_t* pixel_row;  // (images * pixels of y), or null: every pixel its own row
  const int64_t* indices;    // pixels of each row, for the table's gradient
  const int64_t* offsets;
  const void* mean_shift;  // (images or 1, channels), acc, or null: see modulate_input_grad
  const void* mean_scale;
  void* out;                                          // y, the table's gradient (acc), or the gradient of x
  int64_t images, height, width, channels, num_rows;  // height and width of x
  int64_t upsample;                                   // 1 or 2
  int64_t stats_stride, means_stride;                 // 0 where one row of statistics serves all images, else channels
  double negative_slope;
};

// y = act(convolution of x + bias + add), 3 x 3 with padding 1 or 1 x 1, all in acc.
struct ConvParams {
  const void* x;                    // (images, height, width, in)
  const ModulateParams* modulated;  // or null; what x is then: every value is made where it is needed
  const void* panels;               // the weights as pack_conv_weight lays them out
  const void* bias;                 // (out)
  const void* add;                  // like y, or null
  void* y;                          // (images, height, width, out)
  int64_t images, height, width, in, out;
  bool relu;
};

// d_weight = the gradient of a 3 x 3 convolution's weight from that of its result; all in acc.
struct ConvWeightGradParams {
  const void* x;     // (images, height, width, in)
  const void* grad;  // (images, height, width, out)
  void* d_weight;    // (out, in, 9 taps)
  int64_t images, height, width, in, out;
};

struct ConvWeights {
  const void* weight;  // element (o, i, t) at o * out_step + i * in_step + t * tap, acc
  int64_t out, in, num_taps;
  int64_t out_step, in_step, tap;
};

}  // namespace spade
