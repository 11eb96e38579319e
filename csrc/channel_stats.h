// channel_stats on every device: its parameters and the checks of its arguments.
#pragma once

#include "arguments.h"

namespace spade {

struct ChannelStatsParams {
  const void* x;
  void* mean;  // (images, channels), acc
  void* m2;    // (images, channels), acc: sum of squared deviations
  int64_t images, pixels, channels;
};

// out = grad_mean / pixels + 2 * grad_m2 * (x - mean).
struct ChannelStatsGradParams {
  const void* x;
  const void* mean;  // (images, channels), acc, like both gradients
  const void* grad_mean;
  const void* grad_m2;
  void* out;  // like x
  int64_t images, pixels, channels;
};

inline void check_channel_stats(const Tensor& x) {
  Arguments("channel_stats", x).floats("x", x, {kNotEmpty, kNotEmpty, kNotEmpty, kNotEmpty});
}

inline void check_channel_stats_grad(const Tensor& x, const Tensor& mean, const Tensor& grad_mean,
                                     const Tensor& grad_m2) {
  const Arguments a("channel_stats_grad", x);
  a.floats("x", x, {kNotEmpty, kNotEmpty, kNotEmpty, kNotEmpty});
  a.floats("mean", mean, {x.size(0), x.size(1)});
  a.floats("grad_mean", grad_mean, {x.size(0), x.size(1)});
  a.floats("grad_m2", grad_m2, {x.size(0), x.size(1)});
}

}  // namespace spade
