// channel_stats on a CPU: statistics of pieces of an image, merged in order.
#include "../channel_stats.h"

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "calls.h"
#include "vector.h"

namespace spade {
namespace {

constexpr int64_t kPiece = 256;  // pixels, few enough to stay in cache between two passes

// Mean and sum of squared deviations of `pixels` pixels, in one pass for each.
template <class T>
SPADE_INLINE void piece_stats(const T* x, int64_t pixels, int64_t channels, acc_t<T>* mean, acc_t<T>* m2) {
  using A = acc_t<T>;
  std::fill_n(mean, channels, A(0));
  std::fill_n(m2, channels, A(0));
  for (int64_t p = 0; p < pixels; ++p)
    for (int64_t c = 0; c < channels; ++c) mean[c] += static_cast<A>(x[p * channels + c]);
  const A scale = A(1) / pixels;
  for (int64_t c = 0; c < channels; ++c) mean[c] *= scale;
  for (int64_t p = 0; p < pixels; ++p)
    for (int64_t c = 0; c < channels; ++c) {
      const A d = static_cast<A>(x[p * channels + c]) - mean[c];
      m2[c] += d * d;
    }
}

SPADE_TARGET_CLONES void piece_stats_f32(const float* x, int64_t n, int64_t c, float* mean, float* m2) {
  piece_stats(x, n, c, mean, m2);
}
SPADE_TARGET_CLONES void piece_stats_f64(const double* x, int64_t n, int64_t c, double* mean, double* m2) {
  piece_stats(x, n, c, mean, m2);
}
SPADE_TARGET_CLONES void piece_stats_bf16(const c10::BFloat16* x, int64_t n, int64_t c, float* mean, float* m2) {
  piece_stats(x, n, c, mean, m2);
}
SPADE_TARGET_CLONES void piece_stats_f16(const c10::Half* x, int64_t n, int64_t c, float* mean, float* m2) {
  piece_stats(x, n, c, mean, m2);
}

// Merges the pieces of an image in order (Chan et al. 1979).
template <class A>
void merge(int64_t pieces, int64_t pixels, int64_t channels, const A* parts, A* mean, A* m2) {
  std::copy_n(parts, channels, mean);
  std::copy_n(parts + channels, channels, m2);
  for (int64_t i = 1; i < pieces; ++i) {
    const A* part = parts + i * 2 * channels;
    const A before = static_cast<A>(i * kPiece),
            count = static_cast<A>(std::min((i + 1) * kPiece, pixels) - i * kPiece);
    const A share = count / (before + count);
    for (int64_t c = 0; c < channels; ++c) {
      const A delta = part[c] - mean[c];
      mean[c] += delta * share;
      m2[c] += part[channels + c] + delta * delta * (before * share);
    }
  }
}

template <class T, class Piece>
void run(const ChannelStatsParams& p, const Piece& piece_of) {
  using A = acc_t<T>;
  const int64_t pieces = (p.pixels + kPiece - 1) / kPiece;
  std::vector<A> parts(p.images * pieces * 2 * p.channels);
  parallel_for_chunks(p.images * pieces, 1, [&](int64_t begin, int64_t) {
    const int64_t image = begin / pieces, first = begin % pieces * kPiece;
    const T* x = static_cast<const T*>(p.x) + (image * p.pixels + first) * p.channels;
    A* part = parts.data() + begin * 2 * p.channels;
    piece_of(x, std::min(kPiece, p.pixels - first), p.channels, part, part + p.channels);
  });
  for (int64_t n = 0; n < p.images; ++n)
    merge(pieces, p.pixels, p.channels, parts.data() + n * pieces * 2 * p.channels,
          static_cast<A*>(p.mean) + n * p.channels, static_cast<A*>(p.m2) + n * p.channels);
}

void channel_stats(Dtype dtype, const ChannelStatsParams& p) {
  switch (dtype) {
    case Dtype::f32: return run<float>(p, piece_stats_f32);
    case Dtype::f64: return run<double>(p, piece_stats_f64);
    case Dtype::bf16: return run<c10::BFloat16>(p, piece_stats_bf16);
    case Dtype::f16: return run<c10::Half>(p, piece_stats_f16);
  }
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

}  // namespace
}  // namespace spade

STABLE_TORCH_LIBRARY_IMPL(spade_kernels, CPU, m) {
  m.impl("channel_stats", TORCH_BOX(&spade::channel_stats_op));
}
