// Helpers of operators on CUDA tensors: layouts and allocation.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <limits>
#include <optional>

#include "../tensors.h"
#include "launch.h"
#include "launch_limits.h"

namespace spade::cuda {

// x (N, C, h, w) laid out as (N, h, w, C).
inline Tensor channels_last(const Tensor& x) {
  require(x.size(0) <= std::numeric_limits<uint16_t>::max(), "a batch must have at most 65535 images");
  return torch::stable::contiguous(x, torch::headeronly::MemoryFormat::ChannelsLast);
}

inline Tensor empty_channels_last(const Tensor& x, int64_t upsample = 1) {
  return torch::stable::empty({x.size(0), x.size(1), upsample * x.size(2), upsample * x.size(3)}, x.scalar_type(),
                              std::nullopt, x.device(), std::nullopt, torch::headeronly::MemoryFormat::ChannelsLast);
}

}  // namespace spade::cuda
