// modulate on a CPU, for the convolutions that modulate their input where they read it.
#pragma once

#include "../modulate.h"
#include "calls.h"

namespace spade {

// Computes the pixels [begin, end) of the result, on this thread, and writes them to `y`, `row` values apart.
void modulate_pixels(Dtype dtype, const ModulateParams& params, int64_t begin, int64_t end, void* y, int64_t row);

// The tensors of a modulate call in the kernels' layout, kept alive beside the parameters that point into them.
struct __attribute__((visibility("hidden"))) ModulateCall {  // hidden, because torch's Tensor is
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
