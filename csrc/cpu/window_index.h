#pragma once

#include <cstdint>
#include <vector>

#include "../ops.h"

namespace spade {

struct ImageWindows {
  std::vector<int64_t> windows;    // (rows, kernel_size^2)
  std::vector<int64_t> pixel_row;  // (out_height * out_width)
};

// Distinct windows of one image, rows numbered by first occurrence.
ImageWindows window_index(const WindowIndexParams& params);

}  // namespace spade
