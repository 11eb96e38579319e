// Helpers of operators on CPU tensors: layouts, allocation, and the strides of convolution weights.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../tensors.h"
#include "segments.h"

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

// The sum over the rows of values that are (rows, width) in memory.
inline Tensor column_sum(const Tensor& values, int64_t rows, int64_t width) {
  const int64_t all[] = {0, rows};
  const Tensor sum = torch::stable::new_empty(values, {width});
  segment_sum(dtype_of(values), {values.const_data_ptr(), nullptr, all, sum.mutable_data_ptr(), 1, width, width, 1});
  return sum;
}

// The distance between neighbouring taps of a weight, in elements. The stride of a dimension of size 1 is arbitrary.
inline int64_t tap_step(const Tensor& weight) {
  return weight.size(3) > 1 ? weight.stride(3) : weight.stride(2);
}

// True if neighbouring taps of a weight have equal distances, as in contiguous and in channels-last weights.
inline bool evenly_apart(const Tensor& weight) {
  return weight.size(2) == 1 || weight.size(3) == 1 || weight.stride(2) == weight.size(3) * weight.stride(3);
}

}  // namespace spade
