#include "kernels.h"
#include "segments.h"

namespace spade {
namespace {

constexpr int64_t kPixelPiece = 64;
constexpr int64_t kSegmentPiece = 256;

// Everything about one pixel: where its channels are, and the scale and shift it takes.
template <class T>
struct Pixel {
  using A = acc_t<T>;
  const T* x;
  const A *mean, *rstd, *scale, *shift;
  int64_t image;

  SPADE_INLINE Pixel(const ModulateParams& p, int64_t i) {
    image = i / p.pixels;
    x = static_cast<const T*>(p.x) + i * p.channels;
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
SPADE_INLINE void forward(const ModulateParams& p, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const A slope = static_cast<A>(p.slope);
  for (int64_t i = begin; i < end; ++i) {
    const Pixel<T> pixel(p, i);
    T* y = static_cast<T*>(p.out) + i * p.channels;
    for (int64_t c = 0; c < p.channels; ++c) {
      const A value = pixel.xhat(c) * pixel.scale[c] + pixel.shift[c];
      y[c] = static_cast<T>(value > 0 ? value : value * slope);
    }
  }
}

// Adds the gradients of scale and shift of the pixel to sum (2 * channels).
template <class T>
SPADE_INLINE void add_table_grad(const ModulateParams& p, int64_t i, acc_t<T>* sum) {
  using A = acc_t<T>;
  const A slope = static_cast<A>(p.slope);
  const Pixel<T> pixel(p, i);
  const T* grad = static_cast<const T*>(p.grad) + i * p.channels;
  for (int64_t c = 0; c < p.channels; ++c) {
    const A xhat = pixel.xhat(c), dy = static_cast<A>(grad[c]);
    const A d = xhat * pixel.scale[c] + pixel.shift[c] > 0 ? dy : dy * slope;
    sum[c] += d * xhat;
    sum[p.channels + c] += d;
  }
}

template <class T>
SPADE_INLINE void table_grad_of_entries(const ModulateParams& p, int64_t begin, int64_t end, acc_t<T>* sum) {
  std::fill_n(sum, 2 * p.channels, acc_t<T>(0));
  for (int64_t e = begin; e < end; ++e) add_table_grad<T>(p, p.order ? p.order[e] : e, sum);
}

template <class T>
SPADE_INLINE void input_grad(const ModulateParams& p, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const A slope = static_cast<A>(p.slope);
  for (int64_t i = begin; i < end; ++i) {
    const Pixel<T> pixel(p, i);
    const T* grad = static_cast<const T*>(p.grad) + i * p.channels;
    T* out = static_cast<T*>(p.out) + i * p.channels;
    const A* mean_shift = static_cast<const A*>(p.mean_shift) + (p.mean_shift ? pixel.image * p.means_stride : 0);
    const A* mean_scale = static_cast<const A*>(p.mean_scale) + (p.mean_scale ? pixel.image * p.means_stride : 0);
    for (int64_t c = 0; c < p.channels; ++c) {
      const A xhat = pixel.xhat(c), dy = static_cast<A>(grad[c]);
      A d = (xhat * pixel.scale[c] + pixel.shift[c] > 0 ? dy : dy * slope) * pixel.scale[c];
      if (p.mean_shift) d -= mean_shift[c] + xhat * mean_scale[c];
      out[c] = static_cast<T>(d * pixel.rstd[c]);
    }
  }
}

#define SPADE_FOR_DTYPE(name, T)                                                                            \
  SPADE_EVERY_CPU void forward_##name(const ModulateParams& p, int64_t begin, int64_t end) {                \
    forward<T>(p, begin, end);                                                                              \
  }                                                                                                         \
  SPADE_EVERY_CPU void entries_##name(const ModulateParams& p, int64_t begin, int64_t end, acc_t<T>* sum) { \
    table_grad_of_entries<T>(p, begin, end, sum);                                                           \
  }                                                                                                         \
  SPADE_EVERY_CPU void input_##name(const ModulateParams& p, int64_t begin, int64_t end) {                  \
    input_grad<T>(p, begin, end);                                                                           \
  }
SPADE_FOR_DTYPE(f32, float)
SPADE_FOR_DTYPE(f64, double)
SPADE_FOR_DTYPE(bf16, c10::BFloat16)
SPADE_FOR_DTYPE(f16, c10::Half)
#undef SPADE_FOR_DTYPE

using Pass = void (*)(const ModulateParams&, int64_t, int64_t);

void over_pixels(const ModulateParams& p, Pass pass) {
  in_pieces(p.images * p.pixels, kPixelPiece, [&](int64_t begin, int64_t end) { pass(p, begin, end); });
}

template <class A, class Entries>
void over_rows(const ModulateParams& p, Entries entries) {
  A* out = static_cast<A*>(p.out);
  const int64_t width = 2 * p.channels;
  if (p.pixel_row)
    sum_segments(p.num_rows, p.starts, kSegmentPiece, width, out,
                 [&](int64_t begin, int64_t end, A* sum) { entries(p, begin, end, sum); });
  else
    in_pieces(p.num_rows, kPixelPiece, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) entries(p, i, i + 1, out + i * width);
    });
}

}  // namespace

void modulate(Dtype dtype, const ModulateParams& p) {
  const Pass passes[] = {forward_f32, forward_f64, forward_bf16, forward_f16};
  over_pixels(p, passes[static_cast<int>(dtype)]);
}

void modulate_input_grad(Dtype dtype, const ModulateParams& p) {
  const Pass passes[] = {input_f32, input_f64, input_bf16, input_f16};
  over_pixels(p, passes[static_cast<int>(dtype)]);
}

void modulate_table_grad(Dtype dtype, const ModulateParams& p) {
  switch (dtype) {
    case Dtype::f32: return over_rows<float>(p, entries_f32);
    case Dtype::f64: return over_rows<double>(p, entries_f64);
    case Dtype::bf16: return over_rows<float>(p, entries_bf16);
    case Dtype::f16: return over_rows<float>(p, entries_f16);
  }
}

}  // namespace spade
