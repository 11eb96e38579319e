// Helpers of operators on every device: the dtypes of tensors, and dense copies of tensors with another layout.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "dtype.h"

namespace spade {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::Double: return Dtype::f64;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::f16;
    default: throw std::runtime_error("spade_kernels: tensors must be float16, bfloat16, float32 or float64");
  }
}

inline ScalarType accumulator(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Tensor as(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
}

inline Tensor dense(const Tensor& t, ScalarType dtype) {
  const Tensor same = as(t, dtype);
  return same.is_contiguous() ? same : torch::stable::contiguous(same);
}

inline Tensor dense(const Tensor& t) {
  return dense(t, t.scalar_type());
}

inline MaybeTensor dense(const MaybeTensor& t, ScalarType dtype) {
  if (!t) return std::nullopt;
  return dense(*t, dtype);
}

inline const void* data(const MaybeTensor& t) {
  return t ? t->const_data_ptr() : nullptr;
}

// The text of a string argument, which is deleted. An operator that takes std::string leaks one in each call, because
// torch's conversion to it does (seen in torch 2.13).
inline std::string taken(StringHandle argument) {
  size_t length = 0;
  const char* text = nullptr;
  torch_string_length(argument, &length);
  torch_string_c_str(argument, &text);
  std::string result(text, length);
  torch_delete_string(argument);
  return result;
}

}  // namespace spade
