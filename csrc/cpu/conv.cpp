// conv, conv3x3 and modulate_conv on a CPU. Their kernels are declared in conv.h.
#include "conv.h"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <utility>

#include "modulate.h"
#include "scratch.h"
#include "vector.h"

namespace spade {
namespace {

// Checks packed weight, bias and `add` of a convolution whose input has this shape.
void check_packed(const Arguments& a, const Tensor& packed_weight, const Tensor& bias, const MaybeTensor& add,
                  int64_t images, int64_t channels, int64_t height, int64_t width) {
  a.floats("bias", bias, {kNotEmpty});
  const int64_t out = bias.size(0), points = size_of(packed_weight, 0) == 1 ? 1 : kPoints;
  a.floats("packed_weight", packed_weight, {points, ceil_div(out, kPanelColumns), channels, kPanelColumns});
  a.floats("add", add, {images, out, height, width});
}

// A convolution's weight (out, in, k, k) in the accumulation type, kept alive beside the parameters that point into it.
struct ConvWeightCall {
  Tensor weight;
  ConvWeights params{};

  // `transposed` is for the gradient of the input: it swaps input and output channels and reverses the taps.
  ConvWeightCall(const Tensor& weight_in, ScalarType acc, bool transposed = false) : weight(as(weight_in, acc)) {
    if (!evenly_apart(weight)) weight = torch::stable::contiguous(weight);
    params = {weight.const_data_ptr(), weight.size(0),   weight.size(1),  weight.size(2) * weight.size(3),
              weight.stride(0),        weight.stride(1), tap_step(weight)};
    if (!transposed) return;
    params.weight = static_cast<const char*>(params.weight) + (params.num_taps - 1) * params.tap_step * value_size();
    params.tap_step = -params.tap_step;
    std::swap(params.out, params.in);
    std::swap(params.out_step, params.in_step);
  }

  int64_t points() const {
    return params.num_taps == 1 ? 1 : kPoints;
  }
  int64_t num_panels() const {
    return ceil_div(params.out, kPanelColumns);
  }
  int64_t value_size() const {
    return dtype_of(weight) == Dtype::f64 ? 8 : 4;
  }
};

// A convolution's weights, packed by pack_conv_weight.
struct Panels {
  const void* data;
  int64_t points;
};

Tensor pack_conv_weight_op(const Tensor& weight) {
  const int64_t side = size_of(weight, 2) == 1 ? 1 : 3;
  Arguments("pack_conv_weight", weight).floats("weight", weight, {kNotEmpty, kNotEmpty, side, side});
  const ConvWeightCall call(weight, accumulator(weight));
  const Tensor panels =
      torch::stable::new_empty(call.weight, {call.points(), call.num_panels(), call.params.in, kPanelColumns});
  pack_conv_weight(dtype_of(panels), call.params, panels.mutable_data_ptr());
  return panels;
}

Tensor convolve(ConvParams p, ScalarType acc, const Panels& panels, const Tensor& bias_in, const MaybeTensor& add_in) {
  const Tensor bias = dense(bias_in, acc);
  p.out = bias.size(0);
  MaybeTensor add;
  if (add_in) add = channels_last(as(*add_in, acc));
  const Tensor y = torch::stable::empty({p.images, p.out, p.height, p.width}, acc, std::nullopt, std::nullopt,
                                        std::nullopt, torch::headeronly::MemoryFormat::ChannelsLast);
  if (y.numel() == 0) return y;
  p.panels = panels.data;
  p.bias = bias.const_data_ptr();
  p.add = data(add);
  p.y = y.mutable_data_ptr();
  panels.points == 1 ? conv1x1(dtype_of(y), p) : conv3x3(dtype_of(y), p);
  return y;
}

Tensor convolve(const Tensor& x_in, const Panels& panels, const Tensor& bias, const MaybeTensor& add, bool relu) {
  const ScalarType acc = accumulator(x_in);
  const Tensor x = channels_last(as(x_in, acc));
  ConvParams p{};
  p.x = x.const_data_ptr();
  p.images = x.size(0);
  p.in = x.size(1);
  p.height = x.size(2);
  p.width = x.size(3);
  p.relu = relu;
  return as(convolve(p, acc, panels, bias, add), x_in.scalar_type());
}

// Packs the weight for this call only.
Tensor convolve(const Tensor& x, const ConvWeightCall& call, const Tensor& bias) {
  const int64_t count = call.points() * call.num_panels() * call.params.in * kPanelColumns;
  const Scratch<char> panels(count * call.value_size());
  pack_conv_weight(dtype_of(call.weight), call.params, panels.data());
  return convolve(x, {panels.data(), call.points()}, bias, std::nullopt, false);
}

Tensor conv_op(const Tensor& x, const Tensor& packed_weight_in, const Tensor& bias, const MaybeTensor& add, bool relu) {
  const Arguments a("conv", x);
  a.floats("x", x, {size_of(x, 0), kNotEmpty, kNotEmpty, kNotEmpty});
  check_packed(a, packed_weight_in, bias, add, x.size(0), x.size(1), x.size(2), x.size(3));
  const Tensor panels = dense(packed_weight_in, accumulator(x));
  return convolve(x, {panels.const_data_ptr(), panels.size(0)}, bias, add, relu);
}

Tensor modulate_conv_op(const Tensor& x_in, const Tensor& mean, const Tensor& rstd, const Tensor& table,
                        const MaybeTensor& pixel_row, double negative_slope, int64_t upsample,
                        const Tensor& packed_weight_in, const Tensor& bias, const MaybeTensor& add) {
  const Arguments a("modulate_conv", x_in);
  check_modulation(a, x_in, mean, rstd, table, pixel_row, upsample);
  const int64_t height = upsample * x_in.size(2), width = upsample * x_in.size(3);
  a.require(height > 0 && width > 0, "x holds no pixels");
  check_packed(a, packed_weight_in, bias, add, x_in.size(0), x_in.size(1), height, width);
  const ScalarType acc = accumulator(x_in);
  const Tensor panels = dense(packed_weight_in, acc);
  const ModulateCall call(as(x_in, acc), mean, rstd, table, pixel_row, negative_slope, upsample);
  ConvParams p{};
  p.modulated = &call.params;
  p.images = call.params.images;
  p.in = call.params.channels;
  p.height = upsample * call.params.height;
  p.width = upsample * call.params.width;
  const Tensor y = convolve(p, acc, {panels.const_data_ptr(), panels.size(0)}, bias, add);
  return as(y, x_in.scalar_type());
}

Tensor conv3x3_op(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  const Arguments a("conv3x3", x);
  a.floats("x", x, {size_of(x, 0), kNotEmpty, kNotEmpty, kNotEmpty});
  a.floats("weight", weight, {kNotEmpty, x.size(1), 3, 3});
  a.floats("bias", bias, {weight.size(0)});
  return convolve(x, ConvWeightCall(weight, accumulator(x)), bias);
}

Tensor conv3x3_input_grad_op(const Tensor& grad, const Tensor& weight) {
  const Arguments a("conv3x3_input_grad", grad);
  a.floats("grad", grad, {size_of(grad, 0), kNotEmpty, kNotEmpty, kNotEmpty});
  a.floats("weight", weight, {grad.size(1), kNotEmpty, 3, 3});
  const ConvWeightCall call(weight, accumulator(grad), true);
  return convolve(grad, call, torch::stable::new_zeros(call.weight, {call.params.out}));
}

std::tuple<Tensor, Tensor> conv3x3_weight_grad_op(const Tensor& grad_in, const Tensor& x_in) {
  const Arguments a("conv3x3_weight_grad", grad_in);
  a.floats("grad", grad_in, {size_of(grad_in, 0), kNotEmpty, kNotEmpty, kNotEmpty});
  a.floats("x", x_in, {grad_in.size(0), kNotEmpty, grad_in.size(2), grad_in.size(3)});
  const ScalarType acc = accumulator(grad_in);
  const Tensor grad = channels_last(as(grad_in, acc)), x = channels_last(as(x_in, acc));
  const int64_t images = x.size(0), in = x.size(1), height = x.size(2), width = x.size(3), out = grad.size(1);
  const Tensor d_weight = torch::stable::new_empty(x, {out, in, 3, 3});
  conv3x3_weight_grad(dtype_of(grad), {x.const_data_ptr(), grad.const_data_ptr(), d_weight.mutable_data_ptr(), images,
                                       height, width, in, out});
  return {d_weight, column_sum(grad, images * height * width, out)};
}

}  // namespace
}  // namespace spade

STABLE_TORCH_LIBRARY_IMPL(spade_kernels, CPU, m) {
  m.impl("pack_conv_weight", TORCH_BOX(&spade::pack_conv_weight_op));
  m.impl("conv", TORCH_BOX(&spade::conv_op));
  m.impl("conv3x3", TORCH_BOX(&spade::conv3x3_op));
  m.impl("conv3x3_input_grad", TORCH_BOX(&spade::conv3x3_input_grad_op));
  m.impl("conv3x3_weight_grad", TORCH_BOX(&spade::conv3x3_weight_grad_op));
  m.impl("modulate_conv", TORCH_BOX(&spade::modulate_conv_op));
}
