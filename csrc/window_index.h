// window_index on every device: the checks of its arguments.
#pragma once

#include <algorithm>
#include <string>

#include "arguments.h"

namespace spade {

// Larger maps are refused: the process would run out of memory before an allocation fails.
constexpr int64_t kMostPixels = int64_t{1} << 28, kMostIds = int64_t{1} << 32;

inline void check_window_index(const Tensor& ids, Sizes sizes, int64_t kernel_size, int64_t stride, int64_t padding,
                               int64_t levels) {
  const Arguments a("window_index", ids);
  a.index("ids", ids, {kNotEmpty, kNotEmpty, kNotEmpty}, 1, kMostIds);
  a.require(sizes.size() % 2 == 0, "sizes must be pairs (h, w)");
  a.integer("kernel_size", kernel_size, 1, kMostPixels);
  a.integer("stride", stride, 1, kMostPixels);
  a.integer("padding", padding, 0, kMostPixels);
  a.integer("levels", levels, 1, 2);
  const int64_t images = ids.size(0);
  const auto text = [](int64_t h, int64_t w) { return std::to_string(h) + " x " + std::to_string(w); };
  for (size_t i = 0; i + 1 < sizes.size(); i += 2) {
    int64_t height = sizes[i], width = sizes[i + 1];
    a.integer("height", height, 1, kMostPixels);
    a.integer("width", width, 1, kMostPixels);
    for (int64_t level = 0; level < levels; ++level) {
      height += 2 * padding;
      width += 2 * padding;
      if (std::min(height, width) < kernel_size)
        a.fail("no " + text(kernel_size, kernel_size) + " window fits " + text(height, width) +
               " pixels, padding included");
      if (images > kMostPixels / width / height)
        a.fail(std::to_string(images) + " maps of " + text(height, width) +
               " pixels, padding included, are more than 2^28 pixels");
      height = (height - kernel_size) / stride + 1;
      width = (width - kernel_size) / stride + 1;
      if (kernel_size * kernel_size > kMostEntries / (images * height * width))
        a.fail("the " + text(kernel_size, kernel_size) + " windows of " + text(height, width) +
               " pixels hold more than 2^31 ids");
    }
  }
}

}  // namespace spade
