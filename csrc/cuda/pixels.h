// Code that the three passes of modulate share, for one pixel of y and V channels at a time.
#pragma once

#include "../modulate.h"
#include "access.h"

namespace spade::cuda {

// `table` is the dtype of params.table: that of x or the accumulation type. `parts` is scratch for
// modulate_table_grad_parts() values of the accumulation type.
int64_t modulate_table_grad_parts(Dtype dtype, Dtype table, const ModulateParams& params);
void modulate_table_grad(Dtype dtype, Dtype table, const ModulateParams& params, void* parts, cudaStream_t stream);

constexpr int64_t kMostLanes = 32;

// The index of a pixel of y: of the pixels that pixel `source` of x stands for, the one with the number `which`.
template <int upsample>
SPADE_DEVICE int64_t out_pixel_of(const ModulateParams& p, int64_t image, int64_t source, int which) {
  if constexpr (upsample == 1) return image * p.height * p.width + source;
  const uint32_t y = static_cast<uint32_t>(source) / static_cast<uint32_t>(p.width),
                 x = static_cast<uint32_t>(source) - y * static_cast<uint32_t>(p.width);
  return ((image * p.height + y) * 2 + which / 2) * 2 * p.width + 2 * x + which % 2;
}

// Mean and rstd of V channels of an image.
template <class A, int V>
struct Statistics {
  Values<A, V> mean, rstd;

  SPADE_DEVICE void load(const ModulateParams& p, int64_t image, int64_t channel) {
    mean.load(p.mean, image * p.stats_stride + channel);
    rstd.load(p.rstd, image * p.stats_stride + channel);
  }
  template <class T>
  SPADE_DEVICE A xhat(const Values<T, V>& x, int i) const {
    return (static_cast<A>(x.at[i]) - mean.at[i]) * rstd.at[i];
  }
};

// Scale and shift of V channels of a row of the table, whose values are of type S.
template <class S, int V>
struct Row {
  Values<S, V> scale, shift;

  SPADE_DEVICE void load(const ModulateParams& p, int64_t row, int64_t channel) {
    scale.load(p.table, row * 2 * p.channels + channel);
    shift.load(p.table, (row * 2 + 1) * p.channels + channel);
  }
  template <class A>
  SPADE_DEVICE A apply(A xhat, int i) const {
    return xhat * static_cast<A>(scale.at[i]) + static_cast<A>(shift.at[i]);
  }
};

SPADE_DEVICE int64_t row_of(const ModulateParams& p, int64_t pixel) {
  return p.pixel_row ? load_constant(p.pixel_row + pixel) : pixel;
}

// Calls f(Type<T>, Type<S>, V, upsample) for the arguments of a call.
template <class F>
void for_modulate(Dtype dtype, Dtype table, const ModulateParams& p, const F& f) {
  const auto pointers = {p.x,     p.grad,       p.mean,       p.rstd,
                         p.table, p.mean_shift, p.mean_scale, static_cast<const void*>(p.out)};
  for_dtypes(dtype, table, [&](auto type, auto table_type) {
    using T = typename decltype(type)::type;
    for_vector<T>(p.channels, pointers, [&](auto v) {
      p.upsample == 2 ? f(type, table_type, v, std::integral_constant<int, 2>{})
                      : f(type, table_type, v, std::integral_constant<int, 1>{});
    });
  });
}

}  // namespace spade::cuda
