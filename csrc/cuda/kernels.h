// The CUDA kernels, on pointers; csrc/cuda/ops.cpp has the tensors. Launches are shaped by shapes alone.
#pragma once

#include "../ops.h"

struct CUstream_st;

namespace spade::cuda {

using Stream = CUstream_st*;  // a cudaStream_t, for files without a CUDA header

// The windows of a batch of maps of ids, resized to one size. The last five are scratch of the sizes given.
struct WindowMap {
  const int64_t* ids;                                   // (images, source_height, source_width)
  int64_t first_id;                                     // added to each
  int64_t* pixel_row;                                   // (images, out_height, out_width)
  int64_t* image_offsets;                               // (images + 1)
  int64_t* windows;                                     // (rows, kernel_size^2), for write_windows
  uint32_t source_height, source_width, height, width;  // before and after the resize
  uint32_t out_height, out_width, slot_bits, blocks;    // from plan_window_index
  float scale_y, scale_x;
  uint32_t num_rows;  // for write_windows: what `rows` says
  uint32_t* rows;
  uint32_t* slots;   // (images, 2^slot_bits)
  uint32_t* counts;  // (images, blocks)
  uint32_t* firsts;  // (images, out_height, out_width)
};

// Several maps at once; their slots lie one behind the other.
struct WindowIndexCall {
  static constexpr uint32_t kMostMaps = 8;
  uint32_t images, kernel_size, stride, padding, count;
  WindowMap maps[kMostMaps];
};

// Sets what follows from the sizes: out_height, out_width, slot_bits, blocks, scales.
void plan_window_index(const WindowIndexCall& call, WindowMap& map);
// Finds pixel_row, image_offsets, and how many rows there are; write_windows writes the windows themselves.
void number_windows(const WindowIndexCall& call, Stream stream);
void write_windows(const WindowIndexCall& call, Stream stream);

// `parts`: scratch, channel_stats_parts() values of the accumulation type.
int64_t channel_stats_parts(Dtype dtype, const ChannelStatsParams& params);
void channel_stats(Dtype dtype, const ChannelStatsParams& params, void* parts, Stream stream);
void channel_stats_grad(Dtype dtype, const ChannelStatsGradParams& params, Stream stream);

// `table`: the dtype of params.table, x's or the accumulation type.
void modulate(Dtype dtype, Dtype table, const ModulateParams& params, Stream stream);
void modulate_input_grad(Dtype dtype, Dtype table, const ModulateParams& params, Stream stream);
// `parts`: scratch, modulate_table_grad_parts() values of the accumulation type.
int64_t modulate_table_grad_parts(Dtype dtype, Dtype table, const ModulateParams& params);
void modulate_table_grad(Dtype dtype, Dtype table, const ModulateParams& params, void* parts, Stream stream);

}  // namespace spade::cuda
