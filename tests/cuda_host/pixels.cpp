// The kernels over pixels of x as a host compiler sees them, behind functions that ctypes can call.
#include "../arguments.cpp"
#include "channel_stats.cu"
#include "modulate.cu"
#include "modulate_table_grad.cu"

using namespace spade;
using namespace spade::cuda;

extern "C" {

void run_on(bool in_reverse, int threads) {
  backwards = in_reverse;
  host_threads = threads;
}

void channel_stats(int dtype, const void* x, void* mean, void* m2, const int64_t* shape) {
  const ChannelStatsParams p{x, mean, m2, shape[0], shape[2] * shape[3], shape[1]};
  std::vector<double> parts(channel_stats_parts(Dtype(dtype), p), std::bit_cast<double>(~uint64_t{0}));
  channel_stats(Dtype(dtype), p, parts.data(), nullptr);
}

void channel_stats_grad(int dtype, const void* x, const void* mean, const void* grad_mean, const void* grad_m2,
                        void* out, const int64_t* shape) {
  channel_stats_grad(Dtype(dtype), {x, mean, grad_mean, grad_m2, out, shape[0], shape[2] * shape[3], shape[1]},
                     nullptr);
}

// pass: 0 forward, 1 the table's gradient, 2 that of x. sizes: shape of x, rows of the table, of statistics, of means.
void modulate(int pass, int dtype, int table_dtype, const void* const* inputs, void* out, const int64_t* sizes,
              double negative_slope, int64_t upsample) {
  ModulateParams p{};
  p.x = inputs[0];
  p.grad = inputs[1];
  p.mean = inputs[2];
  p.rstd = inputs[3];
  p.table = inputs[4];
  p.pixel_row = static_cast<const int64_t*>(inputs[5]);
  p.indices = static_cast<const int64_t*>(inputs[6]);
  p.offsets = static_cast<const int64_t*>(inputs[7]);
  p.mean_shift = inputs[8];
  p.mean_scale = inputs[9];
  p.out = out;
  p.images = sizes[0];
  p.channels = sizes[1];
  p.height = sizes[2];
  p.width = sizes[3];
  p.num_rows = sizes[4];
  p.stats_stride = sizes[5] == 1 ? 0 : p.channels;
  p.means_stride = sizes[6] == 1 ? 0 : p.channels;
  p.upsample = upsample;
  p.negative_slope = negative_slope;
  const Dtype x = Dtype(dtype), table = Dtype(table_dtype);
  if (pass == 0) return modulate(x, table, p, nullptr);
  if (pass == 2) return modulate_input_grad(x, table, p, nullptr);
  // NaN as double and as float: what no piece writes must not be read.
  std::vector<double> parts(modulate_table_grad_parts(x, table, p), std::bit_cast<double>(~uint64_t{0}));
  modulate_table_grad(x, table, p, parts.data(), nullptr);
}

}  // extern "C"
