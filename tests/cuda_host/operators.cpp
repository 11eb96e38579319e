// The CUDA operators and their kernels as a host compiler sees them, registered for CPU tensors.
#include "../arguments.cpp"
#include "channel_stats.cu"
#include "modulate.cu"
#include "modulate_table_grad.cu"
#include "window_index.cu"

extern "C" int64_t num_launches() {
  return spade::cuda::launches;
}
