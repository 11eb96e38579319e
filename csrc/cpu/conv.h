// The kernels of convolutions with stride 1. Packed weights are (points, panels, in, kPanelColumns): 1 point for 1 x 1
// weights, kPoints for 3 x 3 ones.
#pragma once

#include "../modulate.h"
#include "gemm.h"

namespace spade {

constexpr int64_t kPoints = 16;

// y = act(convolution of x + bias + add), 3 x 3 with padding 1 or 1 x 1, all in acc.
struct ConvParams {
  const void* x;                    // (images, height, width, in)
  const ModulateParams* modulated;  // or null; if given, x is its result, computed where it is read
  const void* panels;               // weights packed by pack_conv_weight
  const void* bias;                 // (out)
  const void* add;                  // like y, or null
  void* y;                          // (images, height, width, out)
  int64_t images, height, width, in, out;
  bool relu;
};

// d_weight = the gradient of a 3 x 3 convolution's weight from the gradient of its result; all in acc.
struct ConvWeightGradParams {
  const void* x;     // (images, height, width, in)
  const void* grad;  // (images, height, width, out)
  void* d_weight;    // (out, in, 9 taps)
  int64_t images, height, width, in, out;
};

struct ConvWeights {
  const void* weight;  // element (o, i, t) at o * out_step + i * in_step + t * tap_step, acc
  int64_t out, in, num_taps;
  int64_t out_step, in_step, tap_step;
};

void conv1x1(Dtype dtype, const ConvParams& params);
void conv3x3(Dtype dtype, const ConvParams& params);
void conv3x3_weight_grad(Dtype dtype, const ConvWeightGradParams& params);
void pack_conv_weight(Dtype dtype, const ConvWeights& weights, void* panels);

}  // namespace spade
