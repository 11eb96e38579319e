#include "arguments.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/macros.h>
#ifdef USE_CUDA
#include <cuda_runtime.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <stdexcept>

namespace spade {
namespace {

template <class Container>
std::string text_of(const Container& shape) {
  std::string text = "(";
  for (auto size : shape) text += (text.size() > 1 ? ", " : "") + (size == kNotEmpty ? "any" : std::to_string(size));
  return text + (shape.size() == 1 ? ",)" : ")");
}

bool is_float(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
    case ScalarType::Double:
    case ScalarType::BFloat16:
    case ScalarType::Half: return true;
    default: return false;
  }
}

// False if the tensor's storage was freed or made smaller; FSDP, for example, frees that of sharded parameters.
bool has_storage(const Tensor& t) {
  if (t.numel() == 0) return true;
  int64_t last = t.storage_offset(), bytes = 0;
  for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
  return (last + 1) * static_cast<int64_t>(t.element_size()) <= bytes;
}

#ifdef USE_CUDA
bool is_captured(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  STD_CUDA_CHECK(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status));
  return status != cudaStreamCaptureStatusNone;
}
#else
bool is_captured(const Tensor&) {
  return false;
}
#endif

bool reads_values(const Tensor& t) {
  static const char* asked = std::getenv("SPADE_KERNELS_CHECK_INDICES");
  return t.is_cpu() || (asked && std::string(asked) == "1" && !is_captured(t));
}

std::string device_of(const Tensor& t) {
  return t.is_cpu() ? "cpu" : "device " + std::to_string(t.get_device_index());
}

Tensor on_host(const Tensor& t) {
  if (t.is_cpu()) return dense(t);
  return dense(torch::stable::to(t, torch::stable::Device(torch::headeronly::DeviceType::CPU)));
}

const int64_t* data_of(const Tensor& t) {
  return static_cast<const int64_t*>(t.const_data_ptr());
}

}  // namespace

int64_t size_of(const Tensor& t, int64_t d) {
  return d < t.dim() ? t.size(d) : 0;
}

std::string to_string(Sizes shape) {
  return text_of(shape);
}

void Arguments::fail(const std::string& what) const {
  throw std::runtime_error("spade_kernels." + std::string(op_) + ": " + what);
}

void Arguments::floats(const char* name, const Tensor& t, Shape shape) const {
  if (!is_float(t))
    fail(std::string(name) + " must be float16, bfloat16, float32 or float64, got " + toString(t.scalar_type()));
  tensor(name, t, shape);
}

void Arguments::index(const char* name, const Tensor& t, Shape shape, int64_t low, int64_t high) const {
  if (t.scalar_type() != ScalarType::Long) fail(std::string(name) + " must be int64, got " + toString(t.scalar_type()));
  tensor(name, t, shape);
  if (!reads_values(t)) return;
  const Tensor here = on_host(t);
  const int64_t *values = data_of(here), count = here.numel();
  uint64_t most = 0;  // unsigned, so that a value below `low` becomes a large one
  for (int64_t i = 0; i < count; ++i)
    most = std::max(most, static_cast<uint64_t>(values[i]) - static_cast<uint64_t>(low));
  if (count == 0 || most < static_cast<uint64_t>(high - low)) return;
  const auto* bad = std::find_if(values, values + count, [&](int64_t v) { return v < low || v >= high; });
  fail(std::string(name) + " holds " + std::to_string(*bad) + " at position " + std::to_string(bad - values) +
       "; values must be at least " + std::to_string(low) + " and below " + std::to_string(high));
}

void Arguments::bounds(const char* name, const Tensor& t, int64_t count, int64_t entries, bool exactly) const {
  index(name, t, {count + 1}, 0, entries + 1);
  if (!reads_values(t)) return;
  const Tensor here = on_host(t);
  const int64_t* values = data_of(here);
  if (values[0] != 0 || !std::is_sorted(values, values + count + 1) || (exactly && values[count] != entries))
    fail(std::string(name) + " must increase from 0 to " + std::to_string(entries));
}

void Arguments::segments(const MaybeTensor& indices, const MaybeTensor& offsets, int64_t count, int64_t entries) const {
  require(indices.has_value() == offsets.has_value(), "indices and offsets must be given together");
  if (!indices) return;
  index("indices", *indices, {entries}, 0, entries);
  bounds("offsets", *offsets, count, entries);
}

void Arguments::integer(const char* name, int64_t value, int64_t least, int64_t most) const {
  if (value < least || value > most)
    fail(std::string(name) + " must be " + std::to_string(least) + " to " + std::to_string(most) + ", got " +
         std::to_string(value));
}

void Arguments::tensor(const char* name, const Tensor& t, Shape shape) const {
  if (t.is_cpu() != first_.is_cpu() || t.get_device_index() != first_.get_device_index())
    fail(std::string(name) + " is on " + device_of(t) + ", the first argument on " + device_of(first_));
  const Sizes sizes = t.sizes();
  bool fits = sizes.size() == shape.size();
  for (size_t d = 0; fits && d < sizes.size(); ++d)
    fits = shape.begin()[d] == kNotEmpty ? sizes[d] > 0 : sizes[d] == shape.begin()[d];
  if (!fits) fail(std::string(name) + " must have shape " + text_of(shape) + ", got " + text_of(sizes));
  if (!has_storage(t)) fail(std::string(name) + " has no memory: its storage was freed or resized");
}

}  // namespace spade
