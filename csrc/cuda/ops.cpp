// The operators on CUDA tensors: checks, allocation, layout and dtype, then kernels on the current stream. Schemas are
// in spade_kernels/ops.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "../tensors.h"
#include "kernels.h"
#include "launch.h"
#include "launch_limits.h"
#include "window_plan.h"

namespace spade::cuda {
namespace {

// x (N, C, h, w) laid out as (N, h, w, C).
Tensor channels_last(const Tensor& x) {
  require(x.size(0) <= std::numeric_limits<uint16_t>::max(), "a batch has at most 65535 images");
  return torch::stable::contiguous(x, torch::headeronly::MemoryFormat::ChannelsLast);
}

Tensor empty_channels_last(const Tensor& x, int64_t upsample = 1) {
  return torch::stable::empty({x.size(0), x.size(1), upsample * x.size(2), upsample * x.size(3)}, x.scalar_type(),
                              std::nullopt, x.device(), std::nullopt, torch::headeronly::MemoryFormat::ChannelsLast);
}

std::vector<Tensor> window_index_op(const Tensor& ids_in, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                                    int64_t kernel_size, int64_t stride, int64_t padding, int64_t levels) {
  check_window_index(ids_in, sizes, kernel_size, stride, padding, levels);
  const Launch launch(ids_in);
  const Tensor ids = dense(ids_in, ScalarType::Long);
  WindowPlan plan({ids.size(0), ids.size(1), ids.size(2)}, {sizes.begin(), sizes.end()}, kernel_size, stride, padding,
                  levels);
  const Tensor scratch = torch::stable::new_empty(ids, {plan.scratch_size()}, ScalarType::Int);
  plan.divide(static_cast<uint32_t*>(scratch.mutable_data_ptr()));
  std::vector<Tensor> pixel_rows, image_offsets;
  plan.for_each_map([&](WindowMap& map, const WindowMap* before) {
    pixel_rows.push_back(torch::stable::new_empty(ids, {ids.size(0), map.out_height, map.out_width}));
    image_offsets.push_back(torch::stable::new_empty(ids, {ids.size(0) + 1}));
    map.pixel_row = pixel_rows.back().mutable_data_ptr<int64_t>();
    map.image_offsets = image_offsets.back().mutable_data_ptr<int64_t>();
    map.ids = before ? before->pixel_row : ids.const_data_ptr<int64_t>();
    map.first_id = before ? 1 : 0;
  });
  if (pixel_rows.empty()) return {};
  for (const WindowIndexCall& call : plan.calls) number_windows(call, launch.stream());
  launch.check();

  // The one thing the host has to know: how many rows there are.
  std::vector<uint32_t> rows(pixel_rows.size());
  launch.read(rows.data(), plan.calls[0].maps[0].rows, sizeof(uint32_t) * rows.size());
  std::vector<Tensor> results;
  plan.for_each_map([&](WindowMap& map, const WindowMap*) {
    map.num_rows = rows[map.rows - plan.calls[0].maps[0].rows];
    results.push_back(torch::stable::new_empty(ids, {map.num_rows, kernel_size * kernel_size}));
    map.windows = results.back().mutable_data_ptr<int64_t>();
    const size_t i = results.size() / 3;
    results.insert(results.end(), {pixel_rows[i], image_offsets[i]});
  });
  for (const WindowIndexCall& call : plan.calls) write_windows(call, launch.stream());
  launch.check();
  return results;
}

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

// The tensors of a modulate call in the kernels' layout, kept alive beside the parameters that point into them.
class ModulateCall {
 public:
  ModulateCall(const Tensor& x_in, const Tensor& mean, const Tensor& rstd, const Tensor& table_in,
               const MaybeTensor& pixel_row, double negative_slope, int64_t upsample)
      : launch(x_in), x(channels_last(x_in)), dtype(dtype_of(x)) {
    params.x = x.const_data_ptr();
    params.images = x.size(0);
    params.channels = x.size(1);
    params.height = x.size(2);
    params.width = x.size(3);
    params.upsample = upsample;
    params.negative_slope = negative_slope;
    params.stats_stride = add_stats(mean, params.mean);
    add_stats(rstd, params.rstd);

    const bool fits = table_in.scalar_type() == x.scalar_type() || table_in.scalar_type() == accumulator(x);
    table = dense(table_in, fits ? table_in.scalar_type() : accumulator(x));
    params.table = table.const_data_ptr();
    params.num_rows = table.size(0);
    const int64_t pixels = x.size(0) * x.size(2) * x.size(3) * upsample * upsample;
    require(pixels < (int64_t{1} << 31) && params.num_rows < (int64_t{1} << 31), "a call has less than 2^31 pixels");
    if (pixel_row) params.pixel_row = add_index(*pixel_row);
  }

  void add_grad(const Tensor& grad) {
    grad_ = channels_last(as(grad, x.scalar_type()));
    params.grad = data(grad_);
  }

  void add_groups(const MaybeTensor& indices, const MaybeTensor& offsets) {
    if (!params.pixel_row) return;
    params.indices = add_index(*indices);
    params.offsets = add_index(*offsets);
  }

  void add_means(const MaybeTensor& mean_shift, const MaybeTensor& mean_scale) {
    if (!mean_shift || !mean_scale) return;
    params.means_stride = add_stats(*mean_shift, params.mean_shift);
    add_stats(*mean_scale, params.mean_scale);
  }

  const Launch launch;
  const Tensor x;
  const Dtype dtype;
  Tensor table;
  ModulateParams params{};

 private:
  // Returns how far apart images are: 0 if one row serves all.
  int64_t add_stats(const Tensor& t, const void*& pointer) {
    kept_[num_kept_] = dense(t, accumulator(x));
    pointer = data(kept_[num_kept_++]);
    return t.size(0) == 1 ? 0 : t.size(1);
  }
  const int64_t* add_index(const Tensor& t) {
    kept_[num_kept_] = dense(t, ScalarType::Long);
    return static_cast<const int64_t*>(data(kept_[num_kept_++]));
  }

  MaybeTensor grad_, kept_[7];
  int num_kept_ = 0;
};

Tensor modulate_op(const Tensor& x, const Tensor& mean, const Tensor& rstd, const Tensor& table,
                   const MaybeTensor& pixel_row, const MaybeTensor& image_offsets, const MaybeTensor& indices,
                   const MaybeTensor& offsets, double negative_slope, int64_t upsample, std::string stats_scope) {
  check_modulate(x, mean, rstd, table, pixel_row, image_offsets, indices, offsets, upsample, stats_scope);
  ModulateCall call(x, mean, rstd, table, pixel_row, negative_slope, upsample);
  const Tensor y = empty_channels_last(x, upsample);
  call.params.out = y.mutable_data_ptr();
  modulate(call.dtype, dtype_of(call.table), call.params, call.launch.stream());
  call.launch.check();
  return y;
}

Tensor modulate_table_grad_op(const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& rstd,
                              const Tensor& table, const MaybeTensor& pixel_row, const MaybeTensor& indices,
                              const MaybeTensor& offsets, double negative_slope, int64_t upsample) {
  check_modulate_table_grad(grad, x, mean, rstd, table, pixel_row, indices, offsets, upsample);
  ModulateCall call(x, mean, rstd, table, pixel_row, negative_slope, upsample);
  call.add_grad(grad);
  call.add_groups(indices, offsets);
  const Dtype table_dtype = dtype_of(call.table);
  Tensor sums = torch::stable::new_empty(table, {table.size(0), table.size(1)}, accumulator(x));
  if (grad.numel() == 0) return torch::stable::zero_(sums);
  call.params.out = sums.mutable_data_ptr();
  const int64_t count = modulate_table_grad_parts(call.dtype, table_dtype, call.params);
  const Tensor parts = torch::stable::new_empty(x, {count}, accumulator(x));
  modulate_table_grad(call.dtype, table_dtype, call.params, parts.mutable_data_ptr(), call.launch.stream());
  call.launch.check();
  return sums;
}

Tensor modulate_input_grad_op(const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& rstd,
                              const Tensor& table, const MaybeTensor& pixel_row, const MaybeTensor& mean_shift,
                              const MaybeTensor& mean_scale, double negative_slope, int64_t upsample) {
  check_modulate_input_grad(grad, x, mean, rstd, table, pixel_row, mean_shift, mean_scale, upsample);
  ModulateCall call(x, mean, rstd, table, pixel_row, negative_slope, upsample);
  call.add_grad(grad);
  call.add_means(mean_shift, mean_scale);
  const Tensor d_x = empty_channels_last(x);
  call.params.out = d_x.mutable_data_ptr();
  modulate_input_grad(call.dtype, dtype_of(call.table), call.params, call.launch.stream());
  call.launch.check();
  return d_x;
}

}  // namespace
}  // namespace spade::cuda

STABLE_TORCH_LIBRARY_IMPL(spade_kernels, SPADE_DISPATCH_KEY, m) {
  m.impl("window_index", TORCH_BOX(&spade::cuda::window_index_op));
  m.impl("channel_stats", TORCH_BOX(&spade::cuda::channel_stats_op));
  m.impl("channel_stats_grad", TORCH_BOX(&spade::cuda::channel_stats_grad_op));
  m.impl("modulate", TORCH_BOX(&spade::cuda::modulate_op));
  m.impl("modulate_table_grad", TORCH_BOX(&spade::cuda::modulate_table_grad_op));
  m.impl("modulate_input_grad", TORCH_BOX(&spade::cuda::modulate_input_grad_op));
}
