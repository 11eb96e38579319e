// Checks of the limits of CUDA launches; ../arguments.h has the checks for every device.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace spade::cuda {

inline void require(bool holds, const char* what) {
  if (!holds) throw std::runtime_error(std::string("spade_kernels: ") + what);
}

inline uint32_t extent(int64_t value, int64_t least, const char* what) {
  require(value >= least && value < (int64_t{1} << 30), what);
  return static_cast<uint32_t>(value);
}

}  // namespace spade::cuda
