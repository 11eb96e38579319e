// The parameters of window_index on a GPU: the windows of a batch at several sizes and levels, divided into calls with
// as many maps as one launch takes.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <vector>

#include "launch_limits.h"

namespace spade::cuda {

// The windows of a batch of maps of ids, resized to one size. The last four pointers are scratch of the given sizes.
struct WindowMap {
  const int64_t* ids;                                   // (images, source_height, source_width)
  int64_t first_id;                                     // added to each id
  int64_t* pixel_row;                                   // (images, out_height, out_width)
  int64_t* image_offsets;                               // (images + 1)
  int64_t* windows;                                     // (rows, kernel_size^2), for write_windows
  uint32_t source_height, source_width, height, width;  // before and after the resize
  uint32_t out_height, out_width, slot_bits, blocks;    // from plan_window_index
  float scale_y, scale_x;
  uint32_t num_rows;  // the value at `rows`, for write_windows
  uint32_t* rows;
  uint32_t* slots;   // (images, 2^slot_bits)
  uint32_t* counts;  // (images, blocks)
  uint32_t* firsts;  // (images, out_height, out_width)
};

// Several maps for one launch; their slots are contiguous in memory.
struct WindowIndexCall {
  static constexpr uint32_t kMostMaps = 8;
  uint32_t images, kernel_size, stride, padding, count;
  WindowMap maps[kMostMaps];
};

// Sets the fields that follow from the sizes: out_height, out_width, slot_bits, blocks, scales.
void plan_window_index(const WindowIndexCall& call, WindowMap& map);
class WindowPlan {
 public:
  // `shape` is (images, height, width) of the ids. `sizes` is a list of pairs: h, w of the first size, h, w of the
  // second, ...
  WindowPlan(const std::array<int64_t, 3>& shape, const std::vector<int64_t>& sizes, int64_t kernel_size,
             int64_t stride, int64_t padding, int64_t levels)
      : levels_(levels), num_sizes_(static_cast<int64_t>(sizes.size()) / 2) {
    constexpr int64_t most = WindowIndexCall::kMostMaps;
    WindowIndexCall call{};
    require(sizes.size() % 2 == 0, "sizes must be pairs (h, w)");
    require(levels >= 1, "levels must be positive");
    require(shape[0] >= 1 && shape[0] <= std::numeric_limits<uint16_t>::max(), "a batch must have 1 to 65535 images");
    call.images = static_cast<uint32_t>(shape[0]);
    call.kernel_size = extent(kernel_size, 1, "kernel_size must be positive");
    call.stride = extent(stride, 1, "stride must be positive");
    call.padding = extent(padding, 0, "padding must not be negative");
    for (int64_t first = 0; first < num_sizes_; first += most) {
      call.count = static_cast<uint32_t>(std::min(most, num_sizes_ - first));
      for (uint32_t i = 0; i < call.count; ++i) {
        call.maps[i].source_height = extent(shape[1], 1, "the map is empty or too large");
        call.maps[i].source_width = extent(shape[2], 1, "the map is empty or too large");
        call.maps[i].height = extent(sizes[2 * (first + i)], 1, "sizes must be positive");
        call.maps[i].width = extent(sizes[2 * (first + i) + 1], 1, "sizes must be positive");
      }
      for (int64_t level = 0; level < levels; ++level) {
        for (uint32_t i = 0; i < call.count; ++i) add(call, call.maps[i]);
        calls.push_back(call);
        for (uint32_t i = 0; i < call.count; ++i) {
          WindowMap& map = call.maps[i];
          map.source_height = map.height = map.out_height;
          map.source_width = map.width = map.out_width;
        }
      }
    }
  }

  // Calls of(map, the map of the level before or null), size by size and level by level.
  template <class Of>
  void for_each_map(const Of& of) {
    constexpr int64_t most = WindowIndexCall::kMostMaps;
    for (int64_t size = 0; size < num_sizes_; ++size) {
      WindowMap* before = nullptr;
      for (int64_t level = 0; level < levels_; ++level) {
        WindowMap& map = calls[size / most * levels_ + level].maps[size % most];
        of(map, before);
        before = &map;
      }
    }
  }

  // The size of the scratch that the kernels need, in values of uint32_t.
  int64_t scratch_size() const {
    return slots_ + counts_ + firsts_ + maps_;
  }

  // Gives every map its part of the scratch; the numbers of rows come last, map by map.
  void divide(uint32_t* scratch) {
    uint32_t *slots = scratch, *counts = slots + slots_, *firsts = counts + counts_, *rows = firsts + firsts_;
    for (WindowIndexCall& call : calls)
      for (uint32_t i = 0; i < call.count; ++i) {
        WindowMap& map = call.maps[i];
        map.slots = slots;
        map.counts = counts;
        map.firsts = firsts;
        map.rows = rows++;
        slots += num_slots(call, map);
        counts += call.images * map.blocks;
        firsts += num_windows(call, map);
      }
  }

  std::vector<WindowIndexCall> calls;

 private:
  static int64_t num_slots(const WindowIndexCall& call, const WindowMap& map) {
    return static_cast<int64_t>(call.images) << map.slot_bits;
  }
  static int64_t num_windows(const WindowIndexCall& call, const WindowMap& map) {
    return int64_t{call.images} * map.out_height * map.out_width;
  }
  void add(const WindowIndexCall& call, WindowMap& map) {
    require(int64_t{std::min(map.height, map.width)} + 2 * int64_t{call.padding} >= call.kernel_size,
            "no window fits the size");
    plan_window_index(call, map);
    require(int64_t{map.out_height} * map.out_width < (int64_t{1} << 30) && num_windows(call, map) < (int64_t{1} << 30),
            "a batch must have fewer than 2^30 windows");
    slots_ += num_slots(call, map);
    counts_ += int64_t{call.images} * map.blocks;
    firsts_ += num_windows(call, map);
    ++maps_;
  }

  int64_t levels_, num_sizes_, slots_ = 0, counts_ = 0, firsts_ = 0, maps_ = 0;
};

}  // namespace spade::cuda
