// modulate on a CPU, and its gradients.
#include "modulate.h"

#include <torch/csrc/stable/library.h>

#include <string>

#include "segments.h"

namespace spade {
namespace {

constexpr int64_t kPixelPiece = 64;
constexpr int64_t kSegmentPiece = 256;

// The image, row and column of a pixel.
struct Place {
  int64_t image, y, x;
};

SPADE_INLINE Place place_of(int64_t i, int64_t height, int64_t width) {
  return {i / (height * width), i / width % height, i % width};
}

// Pointers for one pixel of y: its channels of x, its statistics, and its scale and shift.
template <class T>
struct Pixel {
  using A = acc_t<T>;
  const T* x;
  const A *mean, *rstd, *scale, *shift;

  SPADE_INLINE Pixel(const ModulateParams& p, int64_t i) {
    int64_t image = i / (p.height * p.width), source = i;
    if (p.upsample == 2) {
      const Place at = place_of(i, 2 * p.height, 2 * p.width);
      image = at.image;
      source = (image * p.height + at.y / 2) * p.width + at.x / 2;
    }
    x = static_cast<const T*>(p.x) + source * p.channels;
    mean = static_cast<const A*>(p.mean) + image * p.stats_stride;
    rstd = static_cast<const A*>(p.rstd) + image * p.stats_stride;
    scale = static_cast<const A*>(p.table) + (p.pixel_row ? p.pixel_row[i] : i) * 2 * p.channels;
    shift = scale + p.channels;
  }
  SPADE_INLINE A xhat(int64_t c) const {
    return (static_cast<A>(x[c]) - mean[c]) * rstd[c];
  }
};

template <class T>
SPADE_INLINE void forward(const ModulateParams& p, int64_t begin, int64_t end, T* y, int64_t row) {
  using A = acc_t<T>;
  const A negative_slope = static_cast<A>(p.negative_slope);
  for (int64_t i = begin; i < end; ++i, y += row) {
    const Pixel<T> pixel(p, i);
    for (int64_t c = 0; c < p.channels; ++c) {
      const A value = pixel.xhat(c) * pixel.scale[c] + pixel.shift[c];
      y[c] = static_cast<T>(value > 0 ? value : value * negative_slope);
    }
  }
}

// Adds the gradients of scale and shift of the pixel to sum (2 * channels).
template <class T>
SPADE_INLINE void add_table_grad(const ModulateParams& p, int64_t i, acc_t<T>* sum) {
  using A = acc_t<T>;
  const A negative_slope = static_cast<A>(p.negative_slope);
  const Pixel<T> pixel(p, i);
  const T* grad = static_cast<const T*>(p.grad) + i * p.channels;
  A *d_scale = sum, *d_shift = sum + p.channels;
  // The loop has no branch, and ivdep rules out overlapping pointers; otherwise the compiler would not vectorize it.
#pragma GCC ivdep
  for (int64_t c = 0; c < p.channels; ++c) {
    const A xhat = pixel.xhat(c), kept = xhat * pixel.scale[c] + pixel.shift[c] > 0 ? A(1) : negative_slope;
    const A d = static_cast<A>(grad[c]) * kept;
    d_scale[c] += d * xhat;
    d_shift[c] += d;
  }
}

template <class T>
SPADE_INLINE void table_grad_of_entries(const ModulateParams& p, int64_t begin, int64_t end, acc_t<T>* sum) {
  sum_in_blocks(begin, end, 2 * p.channels, sum,
                [&](int64_t e, acc_t<T>* to) { add_table_grad<T>(p, p.indices ? p.indices[e] : e, to); });
}

// The gradient of pixels [begin, end) of x, each from the `shared` pixels of y that it stands for.
template <class T, int shared>
SPADE_INLINE void input_grad_of(const ModulateParams& p, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const A negative_slope = static_cast<A>(p.negative_slope);
  for (int64_t i = begin; i < end; ++i) {
    const Place at = place_of(i, p.height, p.width);
    const int64_t width = 2 * p.width, corner = ((at.image * p.height + at.y) * width + at.x) * 2;
    const int64_t pixels[] = {shared == 1 ? i : corner, corner + 1, corner + width, corner + width + 1};
    const T* grad[shared];
    const A *scale[shared], *shift[shared];
    for (int s = 0; s < shared; ++s) {
      const Pixel<T> pixel(p, pixels[s]);
      grad[s] = static_cast<const T*>(p.grad) + pixels[s] * p.channels;
      scale[s] = pixel.scale;
      shift[s] = pixel.shift;
    }
    const Pixel<T> pixel(p, pixels[0]);
    const A* mean_shift = static_cast<const A*>(p.mean_shift) + (p.mean_shift ? at.image * p.means_stride : 0);
    const A* mean_scale = static_cast<const A*>(p.mean_scale) + (p.mean_scale ? at.image * p.means_stride : 0);
    T* out = static_cast<T*>(p.out) + i * p.channels;
    for (int64_t c = 0; c < p.channels; ++c) {
      const A xhat = pixel.xhat(c);
      A sum = 0;
#pragma GCC unroll 4
      for (int s = 0; s < shared; ++s) {
        const A dy = static_cast<A>(grad[s][c]);
        A d = (xhat * scale[s][c] + shift[s][c] > 0 ? dy : dy * negative_slope) * scale[s][c];
        if (p.mean_shift) d -= mean_shift[c] + xhat * mean_scale[c];
        sum += d;
      }
      out[c] = static_cast<T>(sum * pixel.rstd[c]);
    }
  }
}

template <class T>
SPADE_INLINE void input_grad(const ModulateParams& p, int64_t begin, int64_t end) {
  p.upsample == 2 ? input_grad_of<T, 4>(p, begin, end) : input_grad_of<T, 1>(p, begin, end);
}

#define SPADE_FOR_DTYPE(name, T)                                                                                    \
  SPADE_TARGET_CLONES void forward_##name(const ModulateParams& p, int64_t begin, int64_t end, T* y, int64_t row) { \
    forward(p, begin, end, y, row);                                                                                 \
  }                                                                                                                 \
  SPADE_TARGET_CLONES void entries_##name(const ModulateParams& p, int64_t begin, int64_t end, acc_t<T>* sum) {     \
    table_grad_of_entries<T>(p, begin, end, sum);                                                                   \
  }                                                                                                                 \
  SPADE_TARGET_CLONES void input_##name(const ModulateParams& p, int64_t begin, int64_t end) {                      \
    input_grad<T>(p, begin, end);                                                                                   \
  }
SPADE_FOR_DTYPE(f32, float)
SPADE_FOR_DTYPE(f64, double)
SPADE_FOR_DTYPE(bf16, c10::BFloat16)
SPADE_FOR_DTYPE(f16, c10::Half)
#undef SPADE_FOR_DTYPE

int64_t pixels_of_y(const ModulateParams& p) {
  return p.images * p.height * p.width * p.upsample * p.upsample;
}

template <class A, class Entries>
void over_rows(const ModulateParams& p, Entries entries) {
  A* out = static_cast<A*>(p.out);
  const int64_t width = 2 * p.channels;
  if (p.pixel_row)
    sum_segments(p.num_rows, p.offsets, kSegmentPiece, width, out,
                 [&](int64_t begin, int64_t end, A* sum) { entries(p, begin, end, sum); });
  else
    parallel_for_chunks(p.num_rows, kPixelPiece, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) entries(p, i, i + 1, out + i * width);
    });
}

}  // namespace

void modulate_pixels(Dtype dtype, const ModulateParams& p, int64_t begin, int64_t end, void* y, int64_t row) {
  switch (dtype) {
    case Dtype::f32: return forward_f32(p, begin, end, static_cast<float*>(y), row);
    case Dtype::f64: return forward_f64(p, begin, end, static_cast<double*>(y), row);
    case Dtype::bf16: return forward_bf16(p, begin, end, static_cast<c10::BFloat16*>(y), row);
    case Dtype::f16: return forward_f16(p, begin, end, static_cast<c10::Half*>(y), row);
  }
}

namespace {

void modulate(Dtype dtype, const ModulateParams& p) {
  const int64_t size = dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2;
  parallel_for_chunks(pixels_of_y(p), kPixelPiece, [&](int64_t begin, int64_t end) {
    modulate_pixels(dtype, p, begin, end, static_cast<char*>(p.out) + begin * p.channels * size, p.channels);
  });
}

void modulate_input_grad(Dtype dtype, const ModulateParams& p) {
  using Pass = void (*)(const ModulateParams&, int64_t, int64_t);
  const Pass passes[] = {input_f32, input_f64, input_bf16, input_f16};
  parallel_for_chunks(p.images * p.height * p.width, kPixelPiece,
                      [&](int64_t begin, int64_t end) { passes[static_cast<int>(dtype)](p, begin, end); });
}

void modulate_table_grad(Dtype dtype, const ModulateParams& p) {
  switch (dtype) {
    case Dtype::f32: return over_rows<float>(p, entries_f32);
    case Dtype::f64: return over_rows<double>(p, entries_f64);
    case Dtype::bf16: return over_rows<float>(p, entries_bf16);
    case Dtype::f16: return over_rows<float>(p, entries_f16);
  }
}

Tensor modulate_op(const Tensor& x, const Tensor& mean, const Tensor& rstd, const Tensor& table,
                   const MaybeTensor& pixel_row, const MaybeTensor& image_offsets, const MaybeTensor& indices,
                   const MaybeTensor& offsets, double negative_slope, int64_t upsample, StringHandle scope) {
  const std::string stats_scope = taken(scope);
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
  m.impl("modulate", TORCH_BOX(&spade::modulate_op));
  m.impl("modulate_table_grad", TORCH_BOX(&spade::modulate_table_grad_op));
  m.impl("modulate_input_grad", TORCH_BOX(&spade::modulate_input_grad_op));
}
