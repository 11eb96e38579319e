// What the operators on CPU tensors hand to the kernels: tensors in their layout, kept alive beside the parameters.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../tensors.h"
#include "kernels.h"

namespace spade {

// x (N, C, h, w) laid out as (N, h, w, C).
inline Tensor channels_last(const Tensor& x) {
  return torch::stable::contiguous(x, torch::headeronly::MemoryFormat::ChannelsLast);
}

inline Tensor empty_channels_last(const Tensor& x, int64_t upsample = 1) {
  return torch::stable::empty({x.size(0), x.size(1), upsample * x.size(2), upsample * x.size(3)}, x.scalar_type(),
                              std::nullopt, std::nullopt, std::nullopt, torch::headeronly::MemoryFormat::ChannelsLast);
}

inline const int64_t* ids(const Tensor& t) {
  return static_cast<const int64_t*>(t.const_data_ptr());
}

// The sum over the rows of what lies in memory as (rows, width).
inline Tensor column_sum(const Tensor& values, int64_t rows, int64_t width) {
  const int64_t all[] = {0, rows};
  const Tensor sum = torch::stable::new_empty(values, {width});
  segment_sum(dtype_of(values), {values.const_data_ptr(), nullptr, all, sum.mutable_data_ptr(), 1, width, width, 1});
  return sum;
}

// How far apart a weight's taps are. The stride of a dimension of size 1 means nothing.
inline int64_t tap_step(const Tensor& weight) {
  return weight.size(3) > 1 ? weight.stride(3) : weight.stride(2);
}

// True if a weight's taps are evenly apart, as in contiguous and in channels-last ones.
inline bool evenly_apart(const Tensor& weight) {
  return weight.size(2) == 1 || weight.size(3) == 1 || weight.stride(2) == weight.size(3) * weight.stride(3);
}

// The tensors of a modulate call in the kernels' layout, kept alive beside the parameters that point into them.
struct __attribute__((visibility("hidden"))) ModulateCall {  // as torch's Tensor is
  Tensor x, mean, rstd, table;
  MaybeTensor grad, pixel_row, indices, offsets, mean_shift, mean_scale;
  ModulateParams params{};

  ModulateCall(const Tensor& x_in, const Tensor& mean_in, const Tensor& rstd_in, const Tensor& table_in,
               const MaybeTensor& pixel_row_in, double negative_slope, int64_t upsample)
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
    params.negative_slope = negative_slope;
  }

  void set_grad(const Tensor& grad_in) {
    grad = channels_last(as(grad_in, x.scalar_type()));
    params.grad = data(grad);
  }
};

}  // namespace spade
