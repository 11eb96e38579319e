// The CUDA operators and their kernels as a host compiler sees them, registered for CPU tensors.
#include "../checks.cpp"
#include "channel_stats.cu"
#include "modulate.cu"
#include "modulate_table_grad.cu"
#include "ops.cpp"
#include "window_index.cu"

extern "C" int64_t num_launches() {
  return spade::cuda::launches;
}
