// The operators on CPU tensors but for convolutions: allocation, layout and dtype, then a kernel. Schemas are in
// spade_kernels/ops.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "calls.h"
#include "kernels.h"
#include "vector.h"
#include "window_index.h"

namespace spade {
namespace {

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

int64_t* mutable_ids(const Tensor& t) {
  return static_cast<int64_t*>(t.mutable_data_ptr());
}

// One image's windows at one size, level by level, rows counted from 0 in each.
std::vector<ImageWindows> windows_of_image(const Tensor& map, int64_t image, WindowIndexParams p, int64_t levels) {
  const std::vector<int64_t> rows_of = nearest_indices(map.size(1), p.height),
                             cols_of = nearest_indices(map.size(2), p.width);
  const int64_t* from = ids(map) + image * map.size(1) * map.size(2);
  std::vector<int64_t> level(p.height * p.width);
  for (int64_t y = 0; y < p.height; ++y)
    for (int64_t x = 0; x < p.width; ++x) level[y * p.width + x] = from[rows_of[y] * map.size(2) + cols_of[x]];

  std::vector<ImageWindows> found;
  for (int64_t i = 0; i < levels; ++i) {
    p.out_height = (p.height + 2 * p.padding - p.kernel_size) / p.stride + 1;
    p.out_width = (p.width + 2 * p.padding - p.kernel_size) / p.stride + 1;
    p.ids = level.data();
    found.push_back(window_index(p));
    level = found.back().pixel_row;
    for (int64_t& row : level) ++row;
    p.height = p.out_height;
    p.width = p.out_width;
  }
  return found;
}

std::vector<Tensor> window_index_op(const Tensor& ids_in, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                                    int64_t kernel_size, int64_t stride, int64_t padding, int64_t levels) {
  check_window_index(ids_in, sizes, kernel_size, stride, padding, levels);
  const Tensor map = dense(ids_in);
  const int64_t images = map.size(0), num_sizes = static_cast<int64_t>(sizes.size()) / 2;
  std::vector<std::vector<ImageWindows>> found(num_sizes * images);
  // Not by size: the largest takes three quarters of the time, and other threads' memory is new to each call.
  parallel_for_chunks(images, 1, [&](int64_t n, int64_t) {
    for (int64_t s = 0; s < num_sizes; ++s)
      found[s * images + n] = windows_of_image(
          map, n, {nullptr, sizes[2 * s], sizes[2 * s + 1], kernel_size, stride, padding, 0, 0}, levels);
  });

  std::vector<Tensor> results;
  const int64_t taps = kernel_size * kernel_size;
  for (int64_t s = 0; s < num_sizes; ++s) {
    int64_t height = sizes[2 * s], width = sizes[2 * s + 1];
    std::vector<int64_t> first_id(images, 0);
    for (int64_t level = 0; level < levels; ++level) {
      height = (height + 2 * padding - kernel_size) / stride + 1;
      width = (width + 2 * padding - kernel_size) / stride + 1;
      const auto of = [&](int64_t n) -> const ImageWindows& { return found[s * images + n][level]; };
      const Tensor image_offsets = torch::stable::new_empty(map, {images + 1});
      int64_t* first_row = mutable_ids(image_offsets);
      first_row[0] = 0;
      for (int64_t n = 0; n < images; ++n)
        first_row[n + 1] = first_row[n] + static_cast<int64_t>(of(n).windows.size()) / taps;
      const Tensor windows = torch::stable::new_empty(map, {first_row[images], taps});
      const Tensor pixel_row = torch::stable::new_empty(map, {images, height, width});
      parallel_for_chunks(images, 1, [&](int64_t n, int64_t) {
        int64_t* to = mutable_ids(windows) + first_row[n] * taps;
        for (int64_t id : of(n).windows) *to++ = id == 0 ? 0 : id + first_id[n];
        to = mutable_ids(pixel_row) + n * height * width;
        for (int64_t row : of(n).pixel_row) *to++ = row + first_row[n];
      });
      // The next level's ids are this one's rows.
      first_id.assign(first_row, first_row + images);
      results.insert(results.end(), {windows, pixel_row, image_offsets});
    }
  }
  return results;
}

Tensor gather_sum_op(const Tensor& taps_in, const MaybeTensor& bias_in, const Tensor& windows_in,
                     const MaybeTensor& indices, const MaybeTensor& offsets, bool relu) {
  check_gather_sum(taps_in, bias_in, windows_in, indices, offsets);
  const ScalarType acc = accumulator(taps_in);
  const Tensor taps = dense(taps_in, acc), windows = dense(windows_in);
  const MaybeTensor bias = dense(bias_in, acc);
  const Tensor rows = torch::stable::new_empty(taps, {windows.size(0), taps.size(2)});
  gather_sum(dtype_of(rows), {taps.const_data_ptr(), data(bias), ids(windows), rows.mutable_data_ptr(), windows.size(0),
                              windows.size(1), taps.size(2), relu});
  return dense(rows, taps_in.scalar_type());
}

std::tuple<Tensor, Tensor> gather_sum_grad_op(const Tensor& grad, const Tensor& rows, const Tensor& indices_in,
                                              const Tensor& offsets_in, int64_t num_taps, bool relu) {
  check_gather_sum_grad(grad, rows, indices_in, offsets_in, num_taps);
  const ScalarType acc = accumulator(grad);
  const Tensor indices = dense(indices_in), offsets = dense(offsets_in);
  Tensor masked = dense(grad, acc);
  if (relu) masked = where_positive(dense(rows, acc), masked);
  const int64_t width = masked.size(1), segments = offsets.size(0) - 1;
  const Tensor taps = torch::stable::new_empty(masked, {segments / num_taps, num_taps, width});
  segment_sum(dtype_of(masked), {masked.const_data_ptr(), ids(indices), ids(offsets), taps.mutable_data_ptr(), segments,
                                 width, width, num_taps});
  return {taps, column_sum(masked, masked.size(0), width)};
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
              gamma.size(2) * gamma.size(3), gamma.stride(0),       gamma.stride(1), tap_step(gamma)};
  }

 private:
  bool same_strides() const {
    return gamma.stride(0) == beta.stride(0) && gamma.stride(1) == beta.stride(1) &&
           gamma.stride(2) == beta.stride(2) && gamma.stride(3) == beta.stride(3);
  }
};

Tensor modulation_table_op(const Tensor& hidden_in, const Tensor& gamma, const Tensor& beta, const Tensor& bias_in,
                           const Tensor& windows_in, const MaybeTensor& packed_weight_in, const MaybeTensor& indices,
                           const MaybeTensor& offsets) {
  check_modulation_table(hidden_in, gamma, beta, bias_in, windows_in, packed_weight_in, indices, offsets);
  const ScalarType acc = accumulator(hidden_in);
  const Tensor hidden = dense(hidden_in, acc), bias = dense(bias_in, acc), windows = dense(windows_in);
  const MaybeTensor packed_weight = dense(packed_weight_in, acc);
  const WeightsCall weights(gamma, beta, acc);
  const Tensor table = torch::stable::new_empty(hidden, {windows.size(0), 2 * gamma.size(0)});
  modulation_table(dtype_of(table),
                   {hidden.const_data_ptr(), weights.params, data(packed_weight), bias.const_data_ptr(), ids(windows),
                    table.mutable_data_ptr(), hidden.size(0), windows.size(0)});
  return dense(table, hidden_in.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> modulation_table_grad_op(const Tensor& grad_in, const Tensor& hidden_in,
                                                                    const Tensor& gamma, const Tensor& beta,
                                                                    const Tensor& indices_in,
                                                                    const Tensor& offsets_in) {
  check_modulation_table_grad(grad_in, hidden_in, gamma, beta, indices_in, offsets_in);
  const ScalarType acc = accumulator(grad_in);
  const Tensor grad = dense(grad_in, acc), hidden = dense(hidden_in, acc);
  const Tensor indices = dense(indices_in), offsets = dense(offsets_in);
  const WeightsCall weights(gamma, beta, acc);
  const Tensor d_hidden = torch::stable::empty_like(hidden);
  const auto like_weight = [&] {
    return torch::stable::new_empty(hidden, {gamma.size(0), gamma.size(1), gamma.size(2), gamma.size(3)});
  };
  const Tensor d_gamma = like_weight(), d_beta = like_weight();
  // Id 0, outside the image, comes first and has no hidden row.
  modulation_table_grad(dtype_of(grad), {grad.const_data_ptr(), hidden.const_data_ptr(), weights.params, ids(indices),
                                         ids(offsets) + weights.params.num_taps, d_hidden.mutable_data_ptr(),
                                         d_gamma.mutable_data_ptr(), d_beta.mutable_data_ptr(), hidden.size(0)});
  return {d_hidden, d_gamma, d_beta, column_sum(grad, grad.size(0), grad.size(1))};
}

Tensor pack_modulation_weight_op(const Tensor& gamma, const Tensor& beta) {
  check_pack_modulation_weight(gamma, beta);
  const WeightsCall weights(gamma, beta, accumulator(gamma));
  const ModulationWeights& w = weights.params;
  const int64_t count = ceil_div(2 * w.channels, kPanelColumns);
  const Tensor packed_weight = torch::stable::new_empty(weights.gamma, {count, w.num_taps, w.depth, kPanelColumns});
  pack_modulation_weight(dtype_of(packed_weight), w, packed_weight.mutable_data_ptr());
  return packed_weight;
}

std::tuple<Tensor, Tensor> channel_stats_op(const Tensor& x_in) {
  check_channel_stats(x_in);
  const Tensor x = channels_last(x_in);
  const Tensor mean = torch::stable::new_empty(x, {x.size(0), x.size(1)}, accumulator(x));
  const Tensor m2 = torch::stable::empty_like(mean);
  channel_stats(dtype_of(x), {x.const_data_ptr(), mean.mutable_data_ptr(), m2.mutable_data_ptr(), x.size(0),
                              x.size(2) * x.size(3), x.size(1)});
  return {mean, m2};
}

Tensor modulate_op(const Tensor& x, const Tensor& mean, const Tensor& rstd, const Tensor& table,
                   const MaybeTensor& pixel_row, const MaybeTensor& image_offsets, const MaybeTensor& indices,
                   const MaybeTensor& offsets, double negative_slope, int64_t upsample, std::string stats_scope) {
  check_modulate(x, mean, rstd, table, pixel_row, image_offsets, indices, offsets, upsample, stats_scope);
  ModulateCall call(x, mean, rstd, table, pixel_row, negative_slope, upsample);
  const Tensor y = empty_channels_last(x, upsample);
  call.params.out = y.mutable_data_ptr();
  modulate(dtype_of(x), call.params);
  return y;
}

Tensor modulate_table_grad_op(const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& rstd,
                              const Tensor& table, const MaybeTensor& pixel_row, const MaybeTensor& indices,
                              const MaybeTensor& offsets, double negative_slope, int64_t upsample) {
  check_modulate_table_grad(grad, x, mean, rstd, table, pixel_row, indices, offsets, upsample);
  ModulateCall call(x, mean, rstd, table, pixel_row, negative_slope, upsample);
  call.set_grad(grad);
  if (indices) call.indices = dense(*indices);
  if (offsets) call.offsets = dense(*offsets);
  call.params.indices = pixel_row ? static_cast<const int64_t*>(data(call.indices)) : nullptr;
  call.params.offsets = static_cast<const int64_t*>(data(call.offsets));
  const Tensor sums = torch::stable::new_empty(table, {table.size(0), table.size(1)}, accumulator(x));
  call.params.out = sums.mutable_data_ptr();
  modulate_table_grad(dtype_of(x), call.params);
  return sums;
}

Tensor modulate_input_grad_op(const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& rstd,
                              const Tensor& table, const MaybeTensor& pixel_row, const MaybeTensor& mean_shift,
                              const MaybeTensor& mean_scale, double negative_slope, int64_t upsample) {
  check_modulate_input_grad(grad, x, mean, rstd, table, pixel_row, mean_shift, mean_scale, upsample);
  ModulateCall call(x, mean, rstd, table, pixel_row, negative_slope, upsample);
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

}  // namespace
}  // namespace spade

STABLE_TORCH_LIBRARY_IMPL(spade_kernels, CPU, m) {
  m.impl("window_index", TORCH_BOX(&spade::window_index_op));
  m.impl("gather_sum", TORCH_BOX(&spade::gather_sum_op));
  m.impl("gather_sum_grad", TORCH_BOX(&spade::gather_sum_grad_op));
  m.impl("modulation_table", TORCH_BOX(&spade::modulation_table_op));
  m.impl("pack_modulation_weight", TORCH_BOX(&spade::pack_modulation_weight_op));
  m.impl("modulation_table_grad", TORCH_BOX(&spade::modulation_table_grad_op));
  m.impl("channel_stats", TORCH_BOX(&spade::channel_stats_op));
  m.impl("modulate", TORCH_BOX(&spade::modulate_op));
  m.impl("modulate_table_grad", TORCH_BOX(&spade::modulate_table_grad_op));
  m.impl("modulate_input_grad", TORCH_BOX(&spade::modulate_input_grad_op));
}
