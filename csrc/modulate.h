// modulate on every device: its parameters and the checks of its arguments.
#pragma once

#include <string>

#include "arguments.h"

namespace spade {

// The forward pass reads x; the backward passes read grad, too. Every pixel of x stands for upsample x upsample pixels
// of y and grad; pixel_row and indices refer to these.
struct ModulateParams {
  const void* x;
  const void* grad;          // of y
  const void* mean;          // (images or 1, channels), acc
  const void* rstd;          // like mean
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

// Checks x, its statistics, the table, and the row that each pixel of the result takes from it.
inline void check_modulation(const Arguments& a, const Tensor& x, const Tensor& mean, const Tensor& rstd,
                             const Tensor& table, const MaybeTensor& pixel_row, int64_t upsample) {
  a.integer("upsample", upsample, 1, 2);
  if (x.dim() != 4) a.fail("x must have shape (N, C, h, w), got " + to_string(x.sizes()));
  const int64_t images = x.size(0), channels = x.size(1), height = upsample * x.size(2), width = upsample * x.size(3);
  a.floats("x", x, {images, kNotEmpty, x.size(2), x.size(3)});
  const int64_t rows_of_stats = size_of(mean, 0) == 1 ? 1 : images;
  a.floats("mean", mean, {rows_of_stats, channels});
  a.floats("rstd", rstd, {rows_of_stats, channels});
  a.floats("table", table, {pixel_row ? size_of(table, 0) : images * height * width, 2 * channels});
  if (pixel_row) a.index("pixel_row", *pixel_row, {images, height, width}, 0, table.size(0));
}

inline void check_grad_of_y(const Arguments& a, const Tensor& grad, const Tensor& x, int64_t upsample) {
  a.floats("grad", grad, {x.size(0), x.size(1), upsample * x.size(2), upsample * x.size(3)});
}

inline void check_modulate(const Tensor& x, const Tensor& mean, const Tensor& rstd, const Tensor& table,
                           const MaybeTensor& pixel_row, const MaybeTensor& image_offsets, const MaybeTensor& indices,
                           const MaybeTensor& offsets, int64_t upsample, const std::string& stats_scope) {
  const Arguments a("modulate", x);
  check_modulation(a, x, mean, rstd, table, pixel_row, upsample);
  if (image_offsets) a.bounds("image_offsets", *image_offsets, x.size(0), table.size(0), false);
  if (indices || offsets) a.require(pixel_row.has_value(), "indices and offsets need pixel_row, which is not given");
  a.segments(indices, offsets, table.size(0), pixel_row ? pixel_row->numel() : 0);
  for (const char* known : {"none", "image", "batch", "world"})
    if (stats_scope == known) return;
  const std::string digits = stats_scope.rfind("group:", 0) == 0 ? stats_scope.substr(6) : "";
  if (digits.empty() || digits.size() > 9 || digits[0] == '0' || digits.find_first_not_of("0123456789") != digits.npos)
    a.fail("stats_scope must be none, image, group:G, batch or world, got " + stats_scope);
  if (x.size(1) % std::stoll(digits) != 0) a.fail(digits + " groups do not divide x's channels");
}

inline void check_modulate_table_grad(const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& rstd,
                                      const Tensor& table, const MaybeTensor& pixel_row, const MaybeTensor& indices,
                                      const MaybeTensor& offsets, int64_t upsample) {
  const Arguments a("modulate_table_grad", grad);
  check_modulation(a, x, mean, rstd, table, pixel_row, upsample);
  check_grad_of_y(a, grad, x, upsample);
  a.require(indices.has_value() == pixel_row.has_value(),
            "indices and offsets must be given with pixel_row, and only then");
  a.segments(indices, offsets, table.size(0), pixel_row ? pixel_row->numel() : 0);
}

inline void check_modulate_input_grad(const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& rstd,
                                      const Tensor& table, const MaybeTensor& pixel_row, const MaybeTensor& mean_shift,
                                      const MaybeTensor& mean_scale, int64_t upsample) {
  const Arguments a("modulate_input_grad", grad);
  check_modulation(a, x, mean, rstd, table, pixel_row, upsample);
  check_grad_of_y(a, grad, x, upsample);
  a.require(mean_shift.has_value() == mean_scale.has_value(), "mean_shift and mean_scale must be given together");
  if (!mean_shift) return;
  const int64_t rows = size_of(*mean_shift, 0) == 1 ? 1 : x.size(0);
  a.floats("mean_shift", mean_shift, {rows, x.size(1)});
  a.floats("mean_scale", mean_scale, {rows, x.size(1)});
}

}  // namespace spade
