#include "checks.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/macros.h>
#ifdef USE_CUDA
#include <cuda_runtime.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <initializer_list>
#include <stdexcept>
#include <string>

namespace spade {
namespace {

using Shape = std::initializer_list<int64_t>;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

constexpr int64_t kAny = -1;  // a dimension of any size but 0
// What a window index may hold: beyond it, memory runs out before an allocation fails.
constexpr int64_t kMostPixels = int64_t{1} << 28, kMostEntries = int64_t{1} << 31;
constexpr int64_t kMostIds = int64_t{1} << 32;

template <class Container>
std::string text_of(const Container& shape) {
  std::string text = "(";
  for (auto size : shape) text += (text.size() > 1 ? ", " : "") + (size == kAny ? "any" : std::to_string(size));
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

// False for a tensor whose storage was freed or made smaller, as FSDP frees that of sharded parameters.
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

// The arguments of one call of an operator; all tensors must be on the device of the first.
class Arguments {
 public:
  Arguments(const char* op, const Tensor& first) : op_(op), first_(first) {}

  [[noreturn]] void fail(const std::string& what) const {
    throw std::runtime_error("spade_kernels." + std::string(op_) + ": " + what);
  }
  void require(bool holds, const char* what) const {
    if (!holds) fail(what);
  }

  void floats(const char* name, const Tensor& t, Shape shape) const {
    if (!is_float(t)) fail(std::string(name) + " must be float16, bfloat16, float32 or float64");
    tensor(name, t, shape);
  }
  void floats(const char* name, const MaybeTensor& t, Shape shape) const {
    if (t) floats(name, *t, shape);
  }

  // int64 of this shape, with values in [low, high).
  void index(const char* name, const Tensor& t, Shape shape, int64_t low, int64_t high) const {
    if (t.scalar_type() != ScalarType::Long) fail(std::string(name) + " must be int64");
    tensor(name, t, shape);
    if (!reads_values(t)) return;
    const Tensor here = on_host(t);
    const int64_t *values = data_of(here), count = here.numel();
    uint64_t most = 0;  // without a sign, what is below `low` comes last
    for (int64_t i = 0; i < count; ++i)
      most = std::max(most, static_cast<uint64_t>(values[i]) - static_cast<uint64_t>(low));
    if (count == 0 || most < static_cast<uint64_t>(high - low)) return;
    const auto* bad = std::find_if(values, values + count, [&](int64_t v) { return v < low || v >= high; });
    fail(std::string(name) + " holds " + std::to_string(*bad) + " at position " + std::to_string(bad - values) +
         "; values must be at least " + std::to_string(low) + " and below " + std::to_string(high));
  }

  // The bounds of `count` segments of at most `entries` entries, or of exactly so many: 0, then in increasing order.
  void bounds(const char* name, const Tensor& t, int64_t count, int64_t entries, bool exactly = true) const {
    index(name, t, {count + 1}, 0, entries + 1);
    if (!reads_values(t)) return;
    const Tensor here = on_host(t);
    const int64_t* values = data_of(here);
    if (values[0] != 0 || !std::is_sorted(values, values + count + 1) || (exactly && values[count] != entries))
      fail(std::string(name) + " must increase from 0 to " + std::to_string(entries));
  }

  // Entries in the order of their segments. The forward passes take them for their backward, and do without.
  void segments(const MaybeTensor& indices, const MaybeTensor& offsets, int64_t count, int64_t entries) const {
    require(indices.has_value() == offsets.has_value(), "indices and offsets must be given together");
    if (!indices) return;
    index("indices", *indices, {entries}, 0, entries);
    bounds("offsets", *offsets, count, entries);
  }

  void integer(const char* name, int64_t value, int64_t least, int64_t most) const {
    if (value < least || value > most)
      fail(std::string(name) + " must be " + std::to_string(least) + " to " + std::to_string(most) + ", got " +
           std::to_string(value));
  }

 private:
  static Tensor on_host(const Tensor& t) {
    if (t.is_cpu()) return dense(t);
    return dense(torch::stable::to(t, torch::stable::Device(torch::headeronly::DeviceType::CPU)));
  }
  static const int64_t* data_of(const Tensor& t) {
    return static_cast<const int64_t*>(t.const_data_ptr());
  }

  void tensor(const char* name, const Tensor& t, Shape shape) const {
    if (t.is_cpu() != first_.is_cpu() || t.get_device_index() != first_.get_device_index())
      fail(std::string(name) + " is on another device than the first argument");
    const Sizes sizes = t.sizes();
    bool fits = sizes.size() == shape.size();
    for (size_t d = 0; fits && d < sizes.size(); ++d)
      fits = shape.begin()[d] == kAny ? sizes[d] > 0 : sizes[d] == shape.begin()[d];
    if (!fits) fail(std::string(name) + " must have shape " + text_of(shape) + ", got " + text_of(sizes));
    if (!has_storage(t)) fail(std::string(name) + " has no memory: its storage was freed or resized");
  }

  const char* op_;
  const Tensor& first_;
};

int64_t size_of(const Tensor& t, int64_t d) {
  return d < t.dim() ? t.size(d) : 0;
}

// Weights (C, depth, k, k) of gamma and beta.
void check_weights(const Arguments& a, const Tensor& gamma, const Tensor& beta, int64_t depth) {
  a.floats("gamma", gamma, {kAny, depth, kAny, kAny});
  a.floats("beta", beta, {gamma.size(0), gamma.size(1), gamma.size(2), gamma.size(3)});
}

int64_t taps_of(const Tensor& weight) {
  return weight.size(2) * weight.size(3);
}

int64_t panels_of(int64_t columns) {
  return (columns + kPanelColumns - 1) / kPanelColumns;
}

// x, its statistics, the table and the rows that its pixels, or those of its upsampled result, take from it.
void check_modulation(const Arguments& a, const Tensor& x, const Tensor& mean, const Tensor& rstd, const Tensor& table,
                      const MaybeTensor& pixel_row, int64_t upsample) {
  a.integer("upsample", upsample, 1, 2);
  if (x.dim() != 4) a.fail("x must have shape (N, C, h, w), got " + text_of(x.sizes()));
  const int64_t images = x.size(0), channels = x.size(1), height = upsample * x.size(2), width = upsample * x.size(3);
  a.floats("x", x, {images, kAny, x.size(2), x.size(3)});
  const int64_t rows_of_stats = size_of(mean, 0) == 1 ? 1 : images;
  a.floats("mean", mean, {rows_of_stats, channels});
  a.floats("rstd", rstd, {rows_of_stats, channels});
  a.floats("table", table, {pixel_row ? size_of(table, 0) : images * height * width, 2 * channels});
  if (pixel_row) a.index("pixel_row", *pixel_row, {images, height, width}, 0, table.size(0));
}

void check_grad_of_y(const Arguments& a, const Tensor& grad, const Tensor& x, int64_t upsample) {
  a.floats("grad", grad, {x.size(0), x.size(1), upsample * x.size(2), upsample * x.size(3)});
}

// What modulate's convolution or a plain one reads of its weights, for an input of this shape.
void check_packed(const Arguments& a, const Tensor& packed_weight, const Tensor& bias, const MaybeTensor& add,
                  int64_t images, int64_t channels, int64_t height, int64_t width) {
  a.floats("bias", bias, {kAny});
  const int64_t out = bias.size(0), points = size_of(packed_weight, 0) == 1 ? 1 : kPoints;
  a.floats("packed_weight", packed_weight, {points, panels_of(out), channels, kPanelColumns});
  a.floats("add", add, {images, out, height, width});
}

}  // namespace

void check_window_index(const Tensor& ids, Sizes sizes, int64_t kernel_size, int64_t stride, int64_t padding,
                        int64_t levels) {
  const Arguments a("window_index", ids);
  a.index("ids", ids, {kAny, kAny, kAny}, 1, kMostIds);
  a.require(sizes.size() % 2 == 0, "sizes must be pairs (h, w)");
  a.integer("kernel_size", kernel_size, 1, kMostPixels);
  a.integer("stride", stride, 1, kMostPixels);
  a.integer("padding", padding, 0, kMostPixels);
  a.integer("levels", levels, 1, 2);
  const int64_t images = ids.size(0);
  for (size_t i = 0; i + 1 < sizes.size(); i += 2) {
    int64_t height = sizes[i], width = sizes[i + 1];
    a.integer("a size", height, 1, kMostPixels);
    a.integer("a size", width, 1, kMostPixels);
    for (int64_t level = 0; level < levels; ++level) {
      height += 2 * padding;
      width += 2 * padding;
      a.require(std::min(height, width) >= kernel_size, "no window fits the size");
      a.require(images <= kMostPixels / width / height, "there are more than 2^28 pixels, padding included");
      height = (height - kernel_size) / stride + 1;
      width = (width - kernel_size) / stride + 1;
      a.require(kernel_size * kernel_size <= kMostEntries / (images * height * width),
                "the windows hold more than 2^31 ids; choose a smaller kernel_size");
    }
  }
}

void check_gather_sum(const Tensor& taps, const MaybeTensor& bias, const Tensor& windows, const MaybeTensor& indices,
                      const MaybeTensor& offsets) {
  const Arguments a("gather_sum", taps);
  a.floats("taps", taps, {kAny, kAny, kAny});
  a.floats("bias", bias, {taps.size(2)});
  a.index("windows", windows, {size_of(windows, 0), taps.size(1)}, 0, taps.size(0));
  a.segments(indices, offsets, taps.size(0) * taps.size(1), windows.numel());
}

void check_gather_sum_grad(const Tensor& grad, const Tensor& rows, const Tensor& indices, const Tensor& offsets,
                           int64_t num_taps) {
  const Arguments a("gather_sum_grad", grad);
  a.integer("num_taps", num_taps, 1, kMostEntries);
  a.floats("grad", grad, {size_of(grad, 0), kAny});
  a.floats("rows", rows, {grad.size(0), grad.size(1)});
  a.require(grad.size(0) <= kMostEntries / num_taps, "num_taps is too large for so many rows");
  const int64_t entries = grad.size(0) * num_taps, segments = size_of(offsets, 0) - 1;
  a.require(segments > 0 && segments % num_taps == 0, "offsets must have one value more than a multiple of num_taps");
  a.index("indices", indices, {entries}, 0, entries);
  // A label map with room for more rows has some that belong to no image.
  a.bounds("offsets", offsets, segments, entries, false);
}

void check_modulation_table(const Tensor& hidden, const Tensor& gamma, const Tensor& beta, const Tensor& bias,
                            const Tensor& windows, const MaybeTensor& packed_weight, const MaybeTensor& indices,
                            const MaybeTensor& offsets) {
  const Arguments a("modulation_table", hidden);
  a.floats("hidden", hidden, {size_of(hidden, 0), kAny});
  check_weights(a, gamma, beta, hidden.size(1));
  const int64_t columns = 2 * gamma.size(0), taps = taps_of(gamma);
  a.floats("bias", bias, {columns});
  a.index("windows", windows, {size_of(windows, 0), taps}, 0, hidden.size(0) + 1);
  a.floats("packed_weight", packed_weight, {panels_of(columns), taps, hidden.size(1), kPanelColumns});
  a.segments(indices, offsets, (hidden.size(0) + 1) * taps, windows.numel());
}

void check_modulation_table_grad(const Tensor& grad, const Tensor& hidden, const Tensor& gamma, const Tensor& beta,
                                 const Tensor& indices, const Tensor& offsets) {
  const Arguments a("modulation_table_grad", grad);
  a.floats("hidden", hidden, {size_of(hidden, 0), kAny});
  check_weights(a, gamma, beta, hidden.size(1));
  a.floats("grad", grad, {size_of(grad, 0), 2 * gamma.size(0)});
  a.segments(indices, offsets, (hidden.size(0) + 1) * taps_of(gamma), grad.size(0) * taps_of(gamma));
}

void check_pack_modulation_weight(const Tensor& gamma, const Tensor& beta) {
  check_weights(Arguments("pack_modulation_weight", gamma), gamma, beta, kAny);
}

void check_channel_stats(const Tensor& x) {
  Arguments("channel_stats", x).floats("x", x, {kAny, kAny, kAny, kAny});
}

void check_channel_stats_grad(const Tensor& x, const Tensor& mean, const Tensor& grad_mean, const Tensor& grad_m2) {
  const Arguments a("channel_stats_grad", x);
  a.floats("x", x, {kAny, kAny, kAny, kAny});
  a.floats("mean", mean, {x.size(0), x.size(1)});
  a.floats("grad_mean", grad_mean, {x.size(0), x.size(1)});
  a.floats("grad_m2", grad_m2, {x.size(0), x.size(1)});
}

void check_modulate(const Tensor& x, const Tensor& mean, const Tensor& rstd, const Tensor& table,
                    const MaybeTensor& pixel_row, const MaybeTensor& image_offsets, const MaybeTensor& indices,
                    const MaybeTensor& offsets, int64_t upsample, const std::string& stats_scope) {
  const Arguments a("modulate", x);
  check_modulation(a, x, mean, rstd, table, pixel_row, upsample);
  if (image_offsets) a.bounds("image_offsets", *image_offsets, x.size(0), table.size(0), false);
  if (indices || offsets) a.require(pixel_row.has_value(), "indices and offsets are of pixel_row, which is not given");
  a.segments(indices, offsets, table.size(0), pixel_row ? pixel_row->numel() : 0);
  for (const char* known : {"none", "image", "batch", "world"})
    if (stats_scope == known) return;
  a.fail("stats_scope must be none, image, batch or world, got " + stats_scope);
}

void check_modulate_table_grad(const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& rstd,
                               const Tensor& table, const MaybeTensor& pixel_row, const MaybeTensor& indices,
                               const MaybeTensor& offsets, int64_t upsample) {
  const Arguments a("modulate_table_grad", grad);
  check_modulation(a, x, mean, rstd, table, pixel_row, upsample);
  check_grad_of_y(a, grad, x, upsample);
  a.require(indices.has_value() == pixel_row.has_value(),
            "indices and offsets must be given with pixel_row, and only then");
  a.segments(indices, offsets, table.size(0), pixel_row ? pixel_row->numel() : 0);
}

void check_modulate_input_grad(const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& rstd,
                               const Tensor& table, const MaybeTensor& pixel_row, const MaybeTensor& mean_shift,
                               const MaybeTensor& mean_scale, int64_t upsample) {
  const Arguments a("modulate_input_grad", grad);
  check_modulation(a, x, mean, rstd, table, pixel_row, upsample);
  check_grad_of_y(a, grad, x, upsample);
  a.require(mean_shift.has_value() == mean_scale.has_value(), "mean_shift and mean_scale must be given together");
  if (!mean_shift) return;
  const int64_t rows = size_of(*mean_shift, 0) == 1 ? 1 : x.size(0);
  a.floats("mean_shift", mean_shift, {rows, x.size(1)});
  a.floats("mean_scale", mean_scale, {rows, x.size(1)});
}

void check_pack_conv_weight(const Tensor& weight) {
  const int64_t side = size_of(weight, 2) == 1 ? 1 : 3;
  Arguments("pack_conv_weight", weight).floats("weight", weight, {kAny, kAny, side, side});
}

void check_conv(const Tensor& x, const Tensor& packed_weight, const Tensor& bias, const MaybeTensor& add) {
  const Arguments a("conv", x);
  a.floats("x", x, {size_of(x, 0), kAny, kAny, kAny});
  check_packed(a, packed_weight, bias, add, x.size(0), x.size(1), x.size(2), x.size(3));
}

void check_conv3x3(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  const Arguments a("conv3x3", x);
  a.floats("x", x, {size_of(x, 0), kAny, kAny, kAny});
  a.floats("weight", weight, {kAny, x.size(1), 3, 3});
  a.floats("bias", bias, {weight.size(0)});
}

void check_conv3x3_input_grad(const Tensor& grad, const Tensor& weight) {
  const Arguments a("conv3x3_input_grad", grad);
  a.floats("grad", grad, {size_of(grad, 0), kAny, kAny, kAny});
  a.floats("weight", weight, {grad.size(1), kAny, 3, 3});
}

void check_conv3x3_weight_grad(const Tensor& grad, const Tensor& x) {
  const Arguments a("conv3x3_weight_grad", grad);
  a.floats("grad", grad, {size_of(grad, 0), kAny, kAny, kAny});
  a.floats("x", x, {grad.size(0), kAny, grad.size(2), grad.size(3)});
}

void check_modulate_conv(const Tensor& x, const Tensor& mean, const Tensor& rstd, const Tensor& table,
                         const MaybeTensor& pixel_row, int64_t upsample, const Tensor& packed_weight,
                         const Tensor& bias, const MaybeTensor& add) {
  const Arguments a("modulate_conv", x);
  check_modulation(a, x, mean, rstd, table, pixel_row, upsample);
  const int64_t height = upsample * x.size(2), width = upsample * x.size(3);
  a.require(height > 0 && width > 0, "x holds no pixels");
  check_packed(a, packed_weight, bias, add, x.size(0), x.size(1), height, width);
}

}  // namespace spade
