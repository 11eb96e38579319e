// csrc/cuda/launch.h for a host compiler.
#pragma once

#include <cstring>

#include "../tensors.h"
#include "launch_limits.h"

#define SPADE_DISPATCH_KEY CPU

namespace spade::cuda {

class Launch {
 public:
  explicit Launch(const Tensor& t) {
    require(t.is_cpu(), "the tensors must be on the CPU");
  }
  cudaStream_t stream() const {
    return nullptr;
  }
  void check() const {}
  void read(void* to, const void* from, size_t bytes) const {
    std::memcpy(to, from, bytes);
  }
};

}  // namespace spade::cuda
