// The device and stream that an operator's kernels run on. tests/cuda_host/host_launch.h has the same interface for a
// host compiler, so that tests can run the operators on the CPU, too.
#pragma once

#ifndef USE_CUDA
#include <host_launch.h>
#else
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "../tensors.h"
#include "launch_limits.h"

#define SPADE_DISPATCH_KEY CUDA

namespace spade::cuda {

// The device of a tensor, made current, and its current stream.
class Launch {
 public:
  explicit Launch(const Tensor& t) : device_(index_of(t)), guard_(device_) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const {
    return stream_;
  }
  // Throws if a launch failed, and also for an earlier error of another library.
  void check() const {
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  // Copies from the device to the host, and waits for the stream.
  void read(void* to, const void* from, size_t bytes) const {
    STD_CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream_));
    STD_CUDA_CHECK(cudaStreamSynchronize(stream_));
  }

 private:
  static int32_t index_of(const Tensor& t) {
    require(t.is_cuda(), "the tensors must be on a GPU");
    return t.get_device_index();
  }

  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

}  // namespace spade::cuda
#endif
