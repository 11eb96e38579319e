#include "window_index.h"

#include <algorithm>
#include <bit>
#include <utility>

namespace spade {
namespace {

// Numbers keys by first occurrence. Open addressing; keys are compared whole, so two keys never share a number.
class Interner {
 public:
  Interner() : slots_(size_t{1} << (64 - shift_)) {}

  int64_t number(uint64_t key) {
    // Inside a region every window is like the one before it.
    if (key == last_.key && last_.number >= 0) return last_.number;
    if (static_cast<size_t>(count_) * 2 >= slots_.size()) grow();
    Slot& slot = find(key);
    if (slot.number < 0) slot = {key, count_++};
    last_ = slot;
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
    size_t i = (key * 0x9E3779B97F4A7C15ull) >> shift_;
    while (slots_[i].number >= 0 && slots_[i].key != key) i = (i + 1) & mask;
    return slots_[i];
  }

  void grow() {
    std::vector<Slot> old(slots_.size() * 2);
    old.swap(slots_);
    --shift_;
    for (const Slot& slot : old)
      if (slot.number >= 0) find(slot.key) = slot;
  }

  int shift_ = 64 - 12;  // the top bits of a product depend on the whole key
  std::vector<Slot> slots_;
  Slot last_;
  int64_t count_ = 0;
};

// Numbers runs of k values, each below `bound`, by exact 64-bit keys: of the whole run if it fits, else of pairs
// ((a, b), c) ... of numbers below 2^32.
class RunInterner {
 public:
  RunInterner(int64_t k, int64_t bound)
      : k_(k), bits_(std::bit_width(static_cast<uint64_t>(bound))), stages_(k * bits_ <= 64 ? 1 : k - 1) {}

  int64_t number(const int64_t* run, int64_t step) {
    if (stages_.size() == 1) {
      uint64_t key = 0;
      for (int64_t i = 0; i < k_; ++i) key = key << bits_ | static_cast<uint64_t>(run[i * step]);
      return stages_[0].number(key);
    }
    int64_t name = run[0];
    for (int64_t i = 1; i < k_; ++i)
      name = stages_[i - 1].number(static_cast<uint64_t>(name) << 32 | static_cast<uint64_t>(run[i * step]));
    return name;
  }

  int64_t count() const {
    return stages_.back().count();
  }

 private:
  int64_t k_;
  int bits_;
  std::vector<Interner> stages_;
};

}  // namespace

ImageWindows window_index(const WindowIndexParams& p) {
  const int64_t k = p.kernel_size, width = p.width + 2 * p.padding, height = p.height + 2 * p.padding;
  std::vector<int64_t> padded(height * width, 0);
  for (int64_t y = 0; y < p.height; ++y)
    std::copy_n(p.ids + y * p.width, p.width, padded.begin() + (y + p.padding) * width + p.padding);

  RunInterner across(k, *std::max_element(padded.begin(), padded.end()));
  std::vector<int64_t> bands(height * p.out_width);
  for (int64_t y = 0; y < height; ++y)
    for (int64_t x = 0; x < p.out_width; ++x)
      bands[y * p.out_width + x] = across.number(padded.data() + y * width + x * p.stride, 1);

  RunInterner down(k, across.count());
  ImageWindows result;
  result.pixel_row.resize(p.out_height * p.out_width);
  for (int64_t y = 0; y < p.out_height; ++y)
    for (int64_t x = 0; x < p.out_width; ++x) {
      const int64_t seen = down.count();
      const int64_t row = down.number(bands.data() + y * p.stride * p.out_width + x, p.out_width);
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
