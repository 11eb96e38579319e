#include "window_index.h"

#include <algorithm>
#include <utility>

namespace spade {
namespace {

// Numbers keys by first occurrence. Open addressing; keys are compared whole, so two keys never share a number.
class Interner {
 public:
  Interner() : slots_(1 << 10) {}

  int64_t number(uint64_t key) {
    if (static_cast<size_t>(count_) * 2 >= slots_.size()) grow();
    Slot& slot = find(key);
    if (slot.number < 0) slot = {key, count_++};
    return slot.number;
  }

  int64_t count() const {
    return count_;
  }

 private:
  struct Slot {
    uint64_t key = 0;
    int64_t number = -1;
  };

  Slot& find(uint64_t key) {
    const size_t mask = slots_.size() - 1;
    size_t i = (key * 0x9E3779B97F4A7C15ull) >> 20 & mask;
    while (slots_[i].number >= 0 && slots_[i].key != key) i = (i + 1) & mask;
    return slots_[i];
  }

  void grow() {
    std::vector<Slot> old(slots_.size() * 2);
    old.swap(slots_);
    for (const Slot& slot : old)
      if (slot.number >= 0) find(slot.key) = slot;
  }

  std::vector<Slot> slots_;
  int64_t count_ = 0;
};

uint64_t pair_key(int64_t a, int64_t b) {
  return static_cast<uint64_t>(a) << 32 | static_cast<uint64_t>(b);
}

}  // namespace

ImageWindows window_index(const WindowIndexParams& p) {
  const int64_t k = p.kernel_size, width = p.width + 2 * p.padding, height = p.height + 2 * p.padding;
  std::vector<int64_t> padded(height * width, 0);
  for (int64_t y = 0; y < p.height; ++y)
    std::copy_n(p.ids + y * p.width, p.width, padded.begin() + (y + p.padding) * width + p.padding);

  // A run of ids is named by pairs: ((a, b), c) ... each pair of numbers below 2^32 is one exact 64-bit key.
  std::vector<Interner> across(k), down(k);
  std::vector<int64_t> bands(height * p.out_width);
  for (int64_t y = 0; y < height; ++y)
    for (int64_t x = 0; x < p.out_width; ++x) {
      const int64_t* window = padded.data() + y * width + x * p.stride;
      int64_t name = window[0];
      for (int64_t j = 1; j < k; ++j) name = across[j].number(pair_key(name, window[j]));
      bands[y * p.out_width + x] = name;
    }

  ImageWindows result;
  result.pixel_row.resize(p.out_height * p.out_width);
  for (int64_t y = 0; y < p.out_height; ++y)
    for (int64_t x = 0; x < p.out_width; ++x) {
      const int64_t* band = bands.data() + y * p.stride * p.out_width + x;
      int64_t name = band[0];
      for (int64_t i = 1; i + 1 < k; ++i) name = down[i].number(pair_key(name, band[i * p.out_width]));
      const uint64_t last = k > 1 ? pair_key(name, band[(k - 1) * p.out_width]) : static_cast<uint64_t>(name);
      const int64_t seen = down[k - 1].count(), row = down[k - 1].number(last);
      result.pixel_row[y * p.out_width + x] = row;
      if (row < seen) continue;
      for (int64_t i = 0; i < k; ++i) {
        const int64_t* from = padded.data() + (y * p.stride + i) * width + x * p.stride;
        result.windows.insert(result.windows.end(), from, from + k);
      }
    }
  return result;
}

}  // namespace spade
