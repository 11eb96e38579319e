// The floating-point kernels. Each takes the dtype of x (or of the table) and runs in fixed pieces.
#pragma once

#include "../ops.h"

namespace spade {

void sum_of_taps(Dtype dtype, const SumOfTapsParams& params);
void segment_sum(Dtype dtype, const SegmentSumParams& params);
void modulation_table(Dtype dtype, const ModulationTableParams& params);
void modulation_table_grad(Dtype dtype, const ModulationTableGradParams& params);
void conv3x3(Dtype dtype, const Conv3x3Params& params);
void channel_stats(Dtype dtype, const ChannelStatsParams& params);
void modulate(Dtype dtype, const ModulateParams& params);
void modulate_table_grad(Dtype dtype, const ModulateParams& params);
void modulate_input_grad(Dtype dtype, const ModulateParams& params);

// Weights that stand still are laid out in panels of this many output columns: (panels, taps, depth, kPanelColumns) for
// modulation_table, (16 points, panels, in, kPanelColumns) for conv3x3.
constexpr int64_t kPanelColumns = 32;
void weight_panels(Dtype dtype, const ModulationWeights& weights, void* panels);
void conv3x3_weights(Dtype dtype, const Conv3x3Weights& weights, void* panels);

}  // namespace spade
