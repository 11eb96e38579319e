// The floating-point kernels. Each takes the dtype of x (or of the table) and runs in fixed pieces.
#pragma once

#include "../ops.h"

namespace spade {

void gather_sum(Dtype dtype, const GatherSumParams& params);
void segment_sum(Dtype dtype, const SegmentSumParams& params);
// out[i] = condition[i] > 0 ? values[i] : 0, in acc.
void where_positive(Dtype dtype, const void* condition, const void* values, int64_t count, void* out);
void modulation_table(Dtype dtype, const ModulationTableParams& params);
void modulation_table_grad(Dtype dtype, const ModulationTableGradParams& params);
void channel_stats(Dtype dtype, const ChannelStatsParams& params);
void modulate(Dtype dtype, const ModulateParams& params);
// The pixels [begin, end) of y only, `row` values apart from `y` on; by one thread.
void modulate_pixels(Dtype dtype, const ModulateParams& params, int64_t begin, int64_t end, void* y, int64_t row);
void modulate_table_grad(Dtype dtype, const ModulateParams& params);
void modulate_input_grad(Dtype dtype, const ModulateParams& params);
void conv1x1(Dtype dtype, const ConvParams& params);
void conv3x3(Dtype dtype, const ConvParams& params);
void conv3x3_weight_grad(Dtype dtype, const ConvWeightGradParams& params);

// Weights that stand still, in panels.
void pack_modulation_weight(Dtype dtype, const ModulationWeights& weights, void* panels);
void pack_conv_weight(Dtype dtype, const ConvWeights& weights, void* panels);

}  // namespace spade
