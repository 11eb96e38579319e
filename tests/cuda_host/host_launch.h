// csrc/cuda/launch.h for a host compiler.
#pragma once

#include <cstring>

#include "../tensors.h"
#include "checks.h"

#define SPADE_DISPATCH_KEY CPU

namespace spade::cuda {

class Launch {
 public:
  explicit Launch(const Tensor& t) {
    require_here(t);
  }
  cudaStream_t stream() const {
    return nullptr;
  }
  void check() const {}
  void read(void* to, const void* from, size_t bytes) const {
    std::memcpy(to, from, bytes);
  }
  void require_here(const Tensor& t) const {
    require(t.is_cpu(), "all tensors must be on one device");
  }
};

}  // namespace spade::cuda
