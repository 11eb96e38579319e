// window_index on a CPU: one thread finds the windows of one image.
#include "../window_index.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <bit>
#include <utility>
#include <vector>

#include "calls.h"
#include "vector.h"

namespace spade {
namespace {

// Distinct windows of one image. `ids` (height, width) holds positive numbers below 2^32; 0 stands for outside.
struct WindowIndexParams {
  const int64_t* ids;
  int64_t height, width, kernel_size, stride, padding;
  int64_t out_height, out_width;
};

struct ImageWindows {
  std::vector<int64_t> windows;    // (rows, kernel_size^2)
  std::vector<int64_t> pixel_row;  // (out_height * out_width)
};

// Numbers keys by first occurrence, in a hash table with open addressing. Keys are compared whole, so no two share a
// number.
class Interner {
 public:
  Interner() : slots_(size_t{1} << (64 - shift_)) {}

  int64_t number(uint64_t key) {
    // Inside a region of one class every window equals the one before it.
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

// Numbers runs of k values, each at most `bound`, by exact 64-bit keys: a key is the whole run if it fits; otherwise
// the pair of the number of all values so far, which is below 2^32, and the next value.
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

// Distinct windows of one image, rows numbered by first occurrence.
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

// The source index of each target index, as F.interpolate(mode="nearest") computes it.
std::vector<int64_t> nearest_indices(int64_t from, int64_t to) {
  std::vector<int64_t> result(to);
  const float scale = static_cast<float>(from) / static_cast<float>(to);
  for (int64_t i = 0; i < to; ++i) result[i] = std::min(static_cast<int64_t>(static_cast<float>(i) * scale), from - 1);
  return result;
}

int64_t* mutable_ids(const Tensor& t) {
  return static_cast<int64_t*>(t.mutable_data_ptr());
}

// One image's windows at one size, level by level. In each level the rows are counted from 0.
std::vector<ImageWindows> windows_of_image(const Tensor& map, int64_t image, WindowIndexParams p, int64_t levels) {
  const std::vector<int64_t> rows_of = nearest_indices(map.size(1), p.height),
                             cols_of = nearest_indices(map.size(2), p.width);
  const int64_t* from = ids(map) + image * map.size(1) * map.size(2);
  std::vector<int64_t> level(p.height * p.width);
  for (int64_t y = 0; y < p.height; ++y)
    for (int64_t x = 0; x < p.width; ++x) level[y * p.width + x] = from[rows_of[y] * map.size(2) + cols_of[x]];

  std::vector<ImageWindows> found;
  for (int64_t i = 0; i < levels; ++i) {
    p.out_height = (p.height + 2 * p.padding - p.kernel_size) / p.stride + 1;
    p.out_width = (p.width + 2 * p.padding - p.kernel_size) / p.stride + 1;
    p.ids = level.data();
    found.push_back(window_index(p));
    level = found.back().pixel_row;
    for (int64_t& row : level) ++row;
    p.height = p.out_height;
    p.width = p.out_width;
  }
  return found;
}

std::vector<Tensor> window_index_op(const Tensor& ids_in, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                                    int64_t kernel_size, int64_t stride, int64_t padding, int64_t levels) {
  check_window_index(ids_in, sizes, kernel_size, stride, padding, levels);
  const Tensor map = dense(ids_in);
  const int64_t images = map.size(0), num_sizes = static_cast<int64_t>(sizes.size()) / 2;
  std::vector<std::vector<ImageWindows>> found(num_sizes * images);
  // Tasks are images, not sizes: the largest size takes three quarters of the time, and the memory of further threads
  // is new in every call.
  parallel_for_chunks(images, 1, [&](int64_t n, int64_t) {
    for (int64_t s = 0; s < num_sizes; ++s)
      found[s * images + n] = windows_of_image(
          map, n, {nullptr, sizes[2 * s], sizes[2 * s + 1], kernel_size, stride, padding, 0, 0}, levels);
  });

  std::vector<Tensor> results;
  const int64_t num_taps = kernel_size * kernel_size;
  for (int64_t s = 0; s < num_sizes; ++s) {
    int64_t height = sizes[2 * s], width = sizes[2 * s + 1];
    std::vector<int64_t> first_id(images, 0);
    for (int64_t level = 0; level < levels; ++level) {
      height = (height + 2 * padding - kernel_size) / stride + 1;
      width = (width + 2 * padding - kernel_size) / stride + 1;
      const auto of = [&](int64_t n) -> const ImageWindows& { return found[s * images + n][level]; };
      const Tensor image_offsets = torch::stable::new_empty(map, {images + 1});
      int64_t* first_row = mutable_ids(image_offsets);
      first_row[0] = 0;
      for (int64_t n = 0; n < images; ++n)
        first_row[n + 1] = first_row[n] + static_cast<int64_t>(of(n).windows.size()) / num_taps;
      const Tensor windows = torch::stable::new_empty(map, {first_row[images], num_taps});
      const Tensor pixel_row = torch::stable::new_empty(map, {images, height, width});
      parallel_for_chunks(images, 1, [&](int64_t n, int64_t) {
        int64_t* to = mutable_ids(windows) + first_row[n] * num_taps;
        for (int64_t id : of(n).windows) *to++ = id == 0 ? 0 : id + first_id[n];
        to = mutable_ids(pixel_row) + n * height * width;
        for (int64_t row : of(n).pixel_row) *to++ = row + first_row[n];
      });
      // The next level's ids are this one's rows.
      first_id.assign(first_row, first_row + images);
      results.insert(results.end(), {windows, pixel_row, image_offsets});
    }
  }
  return results;
}

}  // namespace
}  // namespace spade

STABLE_TORCH_LIBRARY_IMPL(spade_kernels, CPU, m) {
  m.impl("window_index", TORCH_BOX(&spade::window_index_op));
}
