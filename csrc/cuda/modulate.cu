// modulate on a GPU, and its gradient of x; modulate_table_grad.cu has the gradient of the table.
#include <string>

#include "../modulate.h"
#include "calls.h"
#include "pixels.h"

namespace spade::cuda {
namespace {

// Computes y in one read of x: a thread has pixels of x, each with the upsample x upsample pixels of y it stands for.
template <class T, class S, int V, int upsample>
struct Forward {
  using A = acc_t<T>;
  static constexpr int kThreads = spade::cuda::kThreads;
  static constexpr int kOutPixels = upsample * upsample;
  static constexpr int kPixels = upsample == 1 ? 2 : 1;  // pixels of x that a thread loads together
  ModulateParams p;

  SPADE_DEVICE void operator()(const Thread& t) const {
    const int64_t channel = (static_cast<int64_t>(t.y) * t.block_x + t.lane) * V, pixels = p.height * p.width;
    const int64_t first = static_cast<int64_t>(t.x) * t.block_y * kPixels + t.row;
    if (channel >= p.channels || first >= pixels) return;
    int64_t at[kPixels * kOutPixels], row[kPixels * kOutPixels];
    Values<T, V> x[kPixels];
    Row<S, V> rows[kPixels * kOutPixels];
    Statistics<A, V> stats;
    // Independent loads come first, because loads from the table depend on the row index. A thread past the end writes
    // the last pixel again, with the same values: with a condition, the compiler would load one pixel after another.
#pragma unroll
    for (int i = 0; i < kPixels * kOutPixels; ++i) {
      const int64_t source = min(first + i / kOutPixels * t.block_y, pixels - 1);
      at[i] = out_pixel_of<upsample>(p, t.z, source, i % kOutPixels);
      row[i] = row_of(p, at[i]);
      if (i % kOutPixels == 0) x[i / kOutPixels].load(p.x, (t.z * pixels + source) * p.channels + channel);
    }
    stats.load(p, t.z, channel);
#pragma unroll
    for (int i = 0; i < kPixels * kOutPixels; ++i) rows[i].load(p, row[i], channel);
    const A negative_slope = static_cast<A>(p.negative_slope);
#pragma unroll
    for (int i = 0; i < kPixels * kOutPixels; ++i) {
      Values<T, V> y;
#pragma unroll
      for (int c = 0; c < V; ++c) {
        const A value = rows[i].apply(stats.xhat(x[i / kOutPixels], c), c);
        y.at[c] = static_cast<T>(value > 0 ? value : value * negative_slope);
      }
      y.store(p.out, at[i] * p.channels + channel);
    }
  }
};

// The gradient of x; one thread computes one pixel.
template <class T, class S, int V, int upsample>
struct InputGrad {
  using A = acc_t<T>;
  static constexpr int kThreads = spade::cuda::kThreads;
  static constexpr int kOutPixels = upsample * upsample;
  ModulateParams p;

  SPADE_DEVICE void operator()(const Thread& t) const {
    const int64_t channel = (static_cast<int64_t>(t.y) * t.block_x + t.lane) * V, pixels = p.height * p.width;
    const int64_t source = static_cast<int64_t>(t.x) * t.block_y + t.row;
    if (channel >= p.channels || source >= pixels) return;
    const int64_t at = (t.z * pixels + source) * p.channels + channel;
    Values<T, V> x, grad[kOutPixels];
    Row<S, V> rows[kOutPixels];
    x.load(p.x, at);
#pragma unroll
    for (int s = 0; s < kOutPixels; ++s) {
      const int64_t out_pixel = out_pixel_of<upsample>(p, t.z, source, s);
      grad[s].load(p.grad, out_pixel * p.channels + channel);
      rows[s].load(p, row_of(p, out_pixel), channel);
    }
    Statistics<A, V> stats;
    stats.load(p, t.z, channel);
    Values<A, V> mean_shift{}, mean_scale{};
    if (p.mean_shift) {
      mean_shift.load(p.mean_shift, t.z * p.means_stride + channel);
      mean_scale.load(p.mean_scale, t.z * p.means_stride + channel);
    }
    const A negative_slope = static_cast<A>(p.negative_slope);
#pragma unroll
    for (int c = 0; c < V; ++c) {
      const A xhat = stats.xhat(x, c);
      A sum = 0;
#pragma unroll
      for (int s = 0; s < kOutPixels; ++s) {
        const A dy = static_cast<A>(grad[s].at[c]);
        const A d = (rows[s].apply(xhat, c) > 0 ? dy : dy * negative_slope) * static_cast<A>(rows[s].scale.at[c]);
        sum += p.mean_shift ? d - mean_shift.at[c] - xhat * mean_scale.at[c] : d;
      }
      x.at[c] = static_cast<T>(sum * stats.rstd.at[c]);
    }
    x.store(p.out, at);
  }
};

// Launches Kernel<T, S, V, upsample> over the pixels of x, each thread taking `pixels` of them.
template <template <class, class, int, int> class Kernel>
void over_pixels(Dtype dtype, Dtype table, const ModulateParams& p, cudaStream_t stream, int64_t pixels) {
  for_modulate(dtype, table, p, [&](auto type, auto table_type, auto v, auto upsample) {
    Grid grid = grid_over(ceil_div(p.channels, v()), kMostLanes, p.images);
    grid.x = static_cast<uint32_t>(ceil_div(p.height * p.width, grid.block_y * pixels));
    using T = typename decltype(type)::type;
    using S = typename decltype(table_type)::type;
    launch(grid, stream, Kernel<T, S, v(), upsample()>{p});
  });
}

}  // namespace

void modulate(Dtype dtype, Dtype table, const ModulateParams& p, cudaStream_t stream) {
  over_pixels<Forward>(dtype, table, p, stream, p.upsample == 2 ? 1 : 2);
}

void modulate_input_grad(Dtype dtype, Dtype table, const ModulateParams& p, cudaStream_t stream) {
  over_pixels<InputGrad>(dtype, table, p, stream, 1);
}

namespace {

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
    require(pixels < (int64_t{1} << 31) && params.num_rows < (int64_t{1} << 31),
            "a call must have fewer than 2^31 pixels and fewer than 2^31 rows of the table");
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
  // Returns the distance between two images' statistics, in elements: 0 if one row serves all.
  int64_t add_stats(const Tensor& t, const void*& pointer) {
    owned_[num_owned_] = dense(t, accumulator(x));
    pointer = data(owned_[num_owned_++]);
    return t.size(0) == 1 ? 0 : t.size(1);
  }
  const int64_t* add_index(const Tensor& t) {
    owned_[num_owned_] = dense(t, ScalarType::Long);
    return static_cast<const int64_t*>(data(owned_[num_owned_++]));
  }

  MaybeTensor grad_, owned_[7];
  int num_owned_ = 0;
};

Tensor modulate_op(const Tensor& x, const Tensor& mean, const Tensor& rstd, const Tensor& table,
                   const MaybeTensor& pixel_row, const MaybeTensor& image_offsets, const MaybeTensor& indices,
                   const MaybeTensor& offsets, double negative_slope, int64_t upsample, StringHandle scope) {
  const std::string stats_scope = taken(scope);
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
  m.impl("modulate", TORCH_BOX(&spade::cuda::modulate_op));
  m.impl("modulate_table_grad", TORCH_BOX(&spade::cuda::modulate_table_grad_op));
  m.impl("modulate_input_grad", TORCH_BOX(&spade::cuda::modulate_input_grad_op));
}
