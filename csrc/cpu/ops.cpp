// The operators on CPU tensors: allocation, layout and dtype, then a kernel. Schemas are in spade_kernels/ops.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "../tensors.h"
#include "kernels.h"
#include "scratch.h"
#include "vector.h"
#include "window_index.h"

namespace spade {
namespace {

// x (N, C, h, w) laid out as (N, h, w, C).
Tensor channels_last(const Tensor& x) {
  return torch::stable::contiguous(x, torch::headeronly::MemoryFormat::ChannelsLast);
}

Tensor empty_channels_last(const Tensor& x, int64_t upsample = 1) {
  return torch::stable::empty({x.size(0), x.size(1), upsample * x.size(2), upsample * x.size(3)}, x.scalar_type(),
                              std::nullopt, std::nullopt, std::nullopt, torch::headeronly::MemoryFormat::ChannelsLast);
}

Tensor where_positive(const Tensor& condition, const Tensor& values) {
  const Tensor result = torch::stable::empty_like(values);
  where_positive(dtype_of(values), condition.const_data_ptr(), values.const_data_ptr(), values.numel(),
                 result.mutable_data_ptr());
  return result;
}

// The source index of each target index, as F.interpolate(mode="nearest") computes it.
std::vector<int64_t> nearest_indices(int64_t from, int64_t to) {
  std::vector<int64_t> result(to);
  const float scale = static_cast<float>(from) / static_cast<float>(to);
  for (int64_t i = 0; i < to; ++i) result[i] = std::min(static_cast<int64_t>(static_cast<float>(i) * scale), from - 1);
  return result;
}

const int64_t* ids(const Tensor& t) {
  return static_cast<const int64_t*>(t.const_data_ptr());
}

std::tuple<Tensor, Tensor, Tensor> window_index_op(const Tensor& ids_in, torch::headeronly::IntHeaderOnlyArrayRef size,
                                                   int64_t kernel_size, int64_t stride, int64_t padding) {
  const Tensor map = dense(ids_in);
  const int64_t images = map.size(0), height = size[0], width = size[1];
  const std::vector<int64_t> rows_of = nearest_indices(map.size(1), height),
                             cols_of = nearest_indices(map.size(2), width);
  const int64_t out_height = (height + 2 * padding - kernel_size) / stride + 1;
  const int64_t out_width = (width + 2 * padding - kernel_size) / stride + 1;

  std::vector<ImageWindows> found(images);
  in_pieces(images, 1, [&](int64_t n, int64_t) {
    std::vector<int64_t> resized(height * width);
    const int64_t* from = ids(map) + n * map.size(1) * map.size(2);
    for (int64_t y = 0; y < height; ++y)
      for (int64_t x = 0; x < width; ++x) resized[y * width + x] = from[rows_of[y] * map.size(2) + cols_of[x]];
    found[n] = window_index({resized.data(), height, width, kernel_size, stride, padding, out_height, out_width});
  });

  const int64_t taps = kernel_size * kernel_size;
  const Tensor image_rows = torch::stable::new_empty(map, {images + 1});
  int64_t* first_row = static_cast<int64_t*>(image_rows.mutable_data_ptr());
  first_row[0] = 0;
  for (int64_t n = 0; n < images; ++n)
    first_row[n + 1] = first_row[n] + static_cast<int64_t>(found[n].windows.size()) / taps;
  const Tensor windows = torch::stable::new_empty(map, {first_row[images], taps});
  const Tensor pixel_row = torch::stable::new_empty(map, {images, out_height, out_width});
  in_pieces(images, 1, [&](int64_t n, int64_t) {
    std::copy(found[n].windows.begin(), found[n].windows.end(),
              static_cast<int64_t*>(windows.mutable_data_ptr()) + first_row[n] * taps);
    int64_t* rows = static_cast<int64_t*>(pixel_row.mutable_data_ptr()) + n * out_height * out_width;
    for (int64_t row : found[n].pixel_row) *rows++ = row + first_row[n];
  });
  return {windows, pixel_row, image_rows};
}

Tensor hidden_rows_op(const Tensor& taps_in, const MaybeTensor& bias_in, const Tensor& windows_in, const MaybeTensor&,
                      const MaybeTensor&, bool relu) {
  const ScalarType acc = accumulator(taps_in);
  const Tensor taps = dense(taps_in, acc), windows = dense(windows_in);
  const MaybeTensor bias = dense(bias_in, acc);
  const Tensor rows = torch::stable::new_empty(taps, {windows.size(0), taps.size(2)});
  sum_of_taps(dtype_of(rows), {taps.const_data_ptr(), data(bias), ids(windows), rows.mutable_data_ptr(),
                               windows.size(0), windows.size(1), taps.size(2), relu});
  return dense(rows, taps_in.scalar_type());
}

// The sum over the rows of what lies in memory as (rows, width).
Tensor column_sum(const Tensor& values, int64_t rows, int64_t width) {
  const int64_t all[] = {0, rows};
  const Tensor sum = torch::stable::new_empty(values, {width});
  segment_sum(dtype_of(values), {values.const_data_ptr(), nullptr, all, sum.mutable_data_ptr(), 1, width, width, 1});
  return sum;
}

std::tuple<Tensor, Tensor> hidden_rows_grad_op(const Tensor& grad, const Tensor& rows, const Tensor& order_in,
                                               const Tensor& starts_in, int64_t num_taps, bool relu) {
  const ScalarType acc = accumulator(grad);
  const Tensor order = dense(order_in), starts = dense(starts_in);
  Tensor masked = dense(grad, acc);
  if (relu) masked = where_positive(dense(rows, acc), masked);
  const int64_t width = masked.size(1), segments = starts.size(0) - 1;
  const Tensor taps = torch::stable::new_empty(masked, {segments / num_taps, num_taps, width});
  segment_sum(dtype_of(masked), {masked.const_data_ptr(), ids(order), ids(starts), taps.mutable_data_ptr(), segments,
                                 width, width, num_taps});
  return {taps, column_sum(masked, masked.size(0), width)};
}

// Whether a weight's taps are evenly apart, as in contiguous and in channels-last ones.
bool evenly_apart(const Tensor& weight) {
  return weight.stride(2) == weight.size(3) * weight.stride(3);
}

// gamma and beta (C, depth, k, k) in the accumulation type, kept alive beside the parameters that point into them.
struct WeightsCall {
  Tensor gamma, beta;
  ModulationWeights params{};

  WeightsCall(const Tensor& gamma_in, const Tensor& beta_in, ScalarType acc)
      : gamma(as(gamma_in, acc)), beta(as(beta_in, acc)) {
    if (!(evenly_apart(gamma) && same_strides())) {
      gamma = torch::stable::contiguous(gamma);
      beta = torch::stable::contiguous(beta);
    }
    params = {gamma.const_data_ptr(),        beta.const_data_ptr(), gamma.size(0),   gamma.size(1),
              gamma.size(2) * gamma.size(3), gamma.stride(0),       gamma.stride(1), gamma.stride(3)};
  }

 private:
  bool same_strides() const {
    return gamma.stride(0) == beta.stride(0) && gamma.stride(1) == beta.stride(1) &&
           gamma.stride(2) == beta.stride(2) && gamma.stride(3) == beta.stride(3);
  }
};

Tensor modulation_table_op(const Tensor& hidden_in, const Tensor& gamma, const Tensor& beta, const Tensor& bias_in,
                           const Tensor& windows_in, const MaybeTensor& panels_in, const MaybeTensor&,
                           const MaybeTensor&) {
  const ScalarType acc = accumulator(hidden_in);
  const Tensor hidden = dense(hidden_in, acc), bias = dense(bias_in, acc), windows = dense(windows_in);
  const MaybeTensor panels = dense(panels_in, acc);
  const WeightsCall weights(gamma, beta, acc);
  const Tensor table = torch::stable::new_empty(hidden, {windows.size(0), 2 * gamma.size(0)});
  modulation_table(dtype_of(table), {hidden.const_data_ptr(), weights.params, data(panels), bias.const_data_ptr(),
                                     ids(windows), table.mutable_data_ptr(), hidden.size(0), windows.size(0)});
  return dense(table, hidden_in.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> modulation_table_grad_op(const Tensor& grad_in, const Tensor& hidden_in,
                                                                    const Tensor& gamma, const Tensor& beta,
                                                                    const Tensor& order_in, const Tensor& starts_in) {
  const ScalarType acc = accumulator(grad_in);
  const Tensor grad = dense(grad_in, acc), hidden = dense(hidden_in, acc);
  const Tensor order = dense(order_in), starts = dense(starts_in);
  const WeightsCall weights(gamma, beta, acc);
  const Tensor d_hidden = torch::stable::empty_like(hidden);
  const auto like_weight = [&] {
    return torch::stable::new_empty(hidden, {gamma.size(0), gamma.size(1), gamma.size(2), gamma.size(3)});
  };
  const Tensor d_gamma = like_weight(), d_beta = like_weight();
  // Id 0, outside the image, comes first and has no hidden row.
  modulation_table_grad(dtype_of(grad), {grad.const_data_ptr(), hidden.const_data_ptr(), weights.params, ids(order),
                                         ids(starts) + weights.params.num_taps, d_hidden.mutable_data_ptr(),
                                         d_gamma.mutable_data_ptr(), d_beta.mutable_data_ptr(), hidden.size(0)});
  return {d_hidden, d_gamma, d_beta, column_sum(grad, grad.size(0), grad.size(1))};
}

Tensor weight_panels_op(const Tensor& gamma, const Tensor& beta) {
  const WeightsCall weights(gamma, beta, accumulator(gamma));
  const ModulationWeights& w = weights.params;
  const int64_t count = divide_up(2 * w.channels, kPanelColumns);
  const Tensor panels = torch::stable::new_empty(weights.gamma, {count, w.num_taps, w.depth, kPanelColumns});
  weight_panels(dtype_of(panels), w, panels.mutable_data_ptr());
  return panels;
}

std::tuple<Tensor, Tensor> channel_stats_op(const Tensor& x_in) {
  const Tensor x = channels_last(x_in);
  const Tensor mean = torch::stable::new_empty(x, {x.size(0), x.size(1)}, accumulator(x));
  const Tensor m2 = torch::stable::empty_like(mean);
  channel_stats(dtype_of(x), {x.const_data_ptr(), mean.mutable_data_ptr(), m2.mutable_data_ptr(), x.size(0),
                              x.size(2) * x.size(3), x.size(1)});
  return {mean, m2};
}

// The tensors of a modulate call in the kernels' layout, kept alive beside the parameters that point into them.
struct ModulateCall {
  Tensor x, mean, rstd, table;
  MaybeTensor grad, pixel_row, order, starts, mean_shift, mean_scale;
  ModulateParams params{};

  ModulateCall(const Tensor& x_in, const Tensor& mean_in, const Tensor& rstd_in, const Tensor& table_in,
               const MaybeTensor& pixel_row_in, double slope, int64_t upsample)
      : x(channels_last(x_in)),
        mean(dense(mean_in, accumulator(x_in))),
        rstd(dense(rstd_in, accumulator(x_in))),
        table(dense(table_in, accumulator(x_in))) {
    if (pixel_row_in) pixel_row = dense(*pixel_row_in);
    params.x = x.const_data_ptr();
    params.mean = mean.const_data_ptr();
    params.rstd = rstd.const_data_ptr();
    params.table = table.const_data_ptr();
    params.pixel_row = static_cast<const int64_t*>(data(pixel_row));
    params.images = x.size(0);
    params.height = x.size(2);
    params.width = x.size(3);
    params.channels = x.size(1);
    params.upsample = upsample;
    params.num_rows = table.size(0);
    params.stats_stride = mean.size(0) == 1 ? 0 : x.size(1);
    params.slope = slope;
  }

  void set_grad(const Tensor& grad_in) {
    grad = channels_last(as(grad_in, x.scalar_type()));
    params.grad = data(grad);
  }
};

Tensor modulate_op(const Tensor& x, const Tensor& mean, const Tensor& rstd, const Tensor& table,
                   const MaybeTensor& pixel_row, const MaybeTensor&, const MaybeTensor&, const MaybeTensor&,
                   double slope, int64_t upsample, std::string) {
  ModulateCall call(x, mean, rstd, table, pixel_row, slope, upsample);
  const Tensor y = empty_channels_last(x, upsample);
  call.params.out = y.mutable_data_ptr();
  modulate(dtype_of(x), call.params);
  return y;
}

Tensor modulate_table_grad_op(const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& rstd,
                              const Tensor& table, const MaybeTensor& pixel_row, const MaybeTensor& order,
                              const MaybeTensor& starts, double slope, int64_t upsample) {
  ModulateCall call(x, mean, rstd, table, pixel_row, slope, upsample);
  call.set_grad(grad);
  if (order) call.order = dense(*order);
  if (starts) call.starts = dense(*starts);
  call.params.order = pixel_row ? static_cast<const int64_t*>(data(call.order)) : nullptr;
  call.params.starts = static_cast<const int64_t*>(data(call.starts));
  const Tensor sums = torch::stable::new_empty(table, {table.size(0), table.size(1)}, accumulator(x));
  call.params.out = sums.mutable_data_ptr();
  modulate_table_grad(dtype_of(x), call.params);
  return sums;
}

Tensor modulate_input_grad_op(const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& rstd,
                              const Tensor& table, const MaybeTensor& pixel_row, const MaybeTensor& mean_shift,
                              const MaybeTensor& mean_scale, double slope, int64_t upsample) {
  ModulateCall call(x, mean, rstd, table, pixel_row, slope, upsample);
  call.set_grad(grad);
  if (mean_shift && mean_scale) {
    call.mean_shift = dense(*mean_shift, accumulator(x));
    call.mean_scale = dense(*mean_scale, accumulator(x));
    call.params.mean_shift = data(call.mean_shift);
    call.params.mean_scale = data(call.mean_scale);
    call.params.means_stride = mean_shift->size(0) == 1 ? 0 : x.size(1);
  }
  const Tensor d_x = empty_channels_last(x);
  call.params.out = d_x.mutable_data_ptr();
  modulate_input_grad(dtype_of(x), call.params);
  return d_x;
}

// A convolution's weight (out, in, k, k) in the accumulation type, kept alive beside the parameters that point into it.
struct ConvWeightCall {
  Tensor weight;
  ConvWeights params{};

  // Transposed, for the gradient of the input: channels change places, taps turn round.
  ConvWeightCall(const Tensor& weight_in, ScalarType acc, bool transposed = false) : weight(as(weight_in, acc)) {
    if (!evenly_apart(weight)) weight = torch::stable::contiguous(weight);
    params = {weight.const_data_ptr(), weight.size(0),   weight.size(1),  weight.size(2) * weight.size(3),
              weight.stride(0),        weight.stride(1), weight.stride(3)};
    if (!transposed) return;
    params.weight = static_cast<const char*>(params.weight) + (params.num_taps - 1) * params.tap * value_size();
    params.tap = -params.tap;
    std::swap(params.out, params.in);
    std::swap(params.out_step, params.in_step);
  }

  int64_t points() const {
    return params.num_taps == 1 ? 1 : kPoints;
  }
  int64_t num_panels() const {
    return divide_up(params.out, kPanelColumns);
  }
  int64_t value_size() const {
    return dtype_of(weight) == Dtype::f64 ? 8 : 4;
  }
};

// A convolution's weights as conv_panels lays them out.
struct Panels {
  const void* data;
  int64_t points, in;
};

Tensor conv_panels_op(const Tensor& weight) {
  const ConvWeightCall call(weight, accumulator(weight));
  const Tensor panels =
      torch::stable::new_empty(call.weight, {call.points(), call.num_panels(), call.params.in, kPanelColumns});
  conv_panels(dtype_of(panels), call.params, panels.mutable_data_ptr());
  return panels;
}

Tensor convolve(ConvParams p, ScalarType acc, const Panels& panels, const Tensor& bias_in, const MaybeTensor& add_in) {
  const Tensor bias = dense(bias_in, acc);
  p.out = bias.size(0);
  if (panels.in != p.in)
    throw std::runtime_error("conv: the input has " + std::to_string(p.in) + " channels, the weights are for " +
                             std::to_string(panels.in));
  MaybeTensor add;
  if (add_in) {
    add = channels_last(as(*add_in, acc));
    if (add->size(0) != p.images || add->size(1) != p.out || add->size(2) != p.height || add->size(3) != p.width)
      throw std::runtime_error("conv: what is to be added has another shape than the result");
  }
  const Tensor y = torch::stable::empty({p.images, p.out, p.height, p.width}, acc, std::nullopt, std::nullopt,
                                        std::nullopt, torch::headeronly::MemoryFormat::ChannelsLast);
  if (y.numel() == 0) return y;
  p.panels = panels.data;
  p.bias = bias.const_data_ptr();
  p.add = data(add);
  p.y = y.mutable_data_ptr();
  panels.points == 1 ? conv1x1(dtype_of(y), p) : conv3x3(dtype_of(y), p);
  return y;
}

Tensor convolve(const Tensor& x_in, const Panels& panels, const Tensor& bias, const MaybeTensor& add, bool relu) {
  const ScalarType acc = accumulator(x_in);
  const Tensor x = channels_last(as(x_in, acc));
  ConvParams p{};
  p.x = x.const_data_ptr();
  p.images = x.size(0);
  p.in = x.size(1);
  p.height = x.size(2);
  p.width = x.size(3);
  p.relu = relu;
  return as(convolve(p, acc, panels, bias, add), x_in.scalar_type());
}

// With a weight that is laid out for this call only.
Tensor convolve(const Tensor& x, const ConvWeightCall& call, const Tensor& bias) {
  const int64_t count = call.points() * call.num_panels() * call.params.in * kPanelColumns;
  const Scratch<char> panels(count * call.value_size());
  conv_panels(dtype_of(call.weight), call.params, panels.data());
  return convolve(x, {panels.data(), call.points(), call.params.in}, bias, std::nullopt, false);
}

Tensor conv_op(const Tensor& x, const Tensor& panels_in, const Tensor& bias, const MaybeTensor& add, bool relu) {
  const Tensor panels = dense(panels_in, accumulator(x));
  return convolve(x, {panels.const_data_ptr(), panels.size(0), panels.size(2)}, bias, add, relu);
}

Tensor modulate_conv_op(const Tensor& x_in, const Tensor& mean, const Tensor& rstd, const Tensor& table,
                        const MaybeTensor& pixel_row, double slope, int64_t upsample, const Tensor& panels_in,
                        const Tensor& bias, const MaybeTensor& add) {
  const ScalarType acc = accumulator(x_in);
  const Tensor panels = dense(panels_in, acc);
  const ModulateCall call(as(x_in, acc), mean, rstd, table, pixel_row, slope, upsample);
  ConvParams p{};
  p.modulated = &call.params;
  p.images = call.params.images;
  p.in = call.params.channels;
  p.height = upsample * call.params.height;
  p.width = upsample * call.params.width;
  const Tensor y = convolve(p, acc, {panels.const_data_ptr(), panels.size(0), panels.size(2)}, bias, add);
  return as(y, x_in.scalar_type());
}

Tensor conv3x3_op(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  if (weight.size(2) != 3 || weight.size(3) != 3)
    throw std::runtime_error("conv3x3: the weight must be (out, in, 3, 3)");
  return convolve(x, ConvWeightCall(weight, accumulator(x)), bias);
}

Tensor conv3x3_input_grad_op(const Tensor& grad, const Tensor& weight) {
  const ConvWeightCall call(weight, accumulator(grad), true);
  return convolve(grad, call, torch::stable::new_zeros(call.weight, {call.params.out}));
}

std::tuple<Tensor, Tensor> conv3x3_weight_grad_op(const Tensor& grad_in, const Tensor& x_in) {
  const ScalarType acc = accumulator(grad_in);
  const Tensor grad = channels_last(as(grad_in, acc)), x = channels_last(as(x_in, acc));
  const int64_t images = x.size(0), in = x.size(1), height = x.size(2), width = x.size(3), out = grad.size(1);
  const Tensor d_weight = torch::stable::empty({out, in, 3, 3}, acc, std::nullopt, std::nullopt, std::nullopt,
                                               torch::headeronly::MemoryFormat::ChannelsLast);
  conv3x3_weight_grad(dtype_of(grad), {x.const_data_ptr(), grad.const_data_ptr(), d_weight.mutable_data_ptr(), images,
                                       height, width, in, out});
  return {d_weight, column_sum(grad, images * height * width, out)};
}

}  // namespace
}  // namespace spade

STABLE_TORCH_LIBRARY_IMPL(spade_kernels, CPU, m) {
  m.impl("window_index", TORCH_BOX(&spade::window_index_op));
  m.impl("hidden_rows", TORCH_BOX(&spade::hidden_rows_op));
  m.impl("hidden_rows_grad", TORCH_BOX(&spade::hidden_rows_grad_op));
  m.impl("modulation_table", TORCH_BOX(&spade::modulation_table_op));
  m.impl("weight_panels", TORCH_BOX(&spade::weight_panels_op));
  m.impl("modulation_table_grad", TORCH_BOX(&spade::modulation_table_grad_op));
  m.impl("channel_stats", TORCH_BOX(&spade::channel_stats_op));
  m.impl("modulate", TORCH_BOX(&spade::modulate_op));
  m.impl("modulate_table_grad", TORCH_BOX(&spade::modulate_table_grad_op));
  m.impl("modulate_input_grad", TORCH_BOX(&spade::modulate_input_grad_op));
  m.impl("conv_panels", TORCH_BOX(&spade::conv_panels_op));
  m.impl("conv", TORCH_BOX(&spade::conv_op));
  m.impl("conv3x3", TORCH_BOX(&spade::conv3x3_op));
  m.impl("conv3x3_input_grad", TORCH_BOX(&spade::conv3x3_input_grad_op));
  m.impl("conv3x3_weight_grad", TORCH_BOX(&spade::conv3x3_weight_grad_op));
  m.impl("modulate_conv", TORCH_BOX(&spade::modulate_conv_op));
}
