// Finds distinct windows with a hash table of pixels (open addressing), which has one region for each image. A slot
// holds a pixel, which stands for its window. Windows are compared by all of their ids, so the hash does not affect the
// result, nor does the choice of the pixel. In the end a slot holds the first pixel of its window, so rows are numbered
// alike in every run.
#include <vector>

#include "../window_index.h"
#include "access.h"
#include "calls.h"
#include "window_plan.h"

namespace spade::cuda {
namespace {

// A test sets the factor to 0, so that all windows have the same hash.
#ifndef SPADE_HASH_FACTOR
#define SPADE_HASH_FACTOR 0x9E3779B97F4A7C15ull
#endif

constexpr uint32_t kEmpty = 0xffffffffu;
constexpr uint32_t kMostBlocks = 1024;  // each block adds up the counts of all blocks before it

// The source index of a target index, as F.interpolate(mode="nearest") computes it.
SPADE_DEVICE uint32_t nearest(uint32_t i, float scale, uint32_t source) {
  const auto found = static_cast<uint32_t>(static_cast<float>(i) * scale);
  return found < source ? found : source - 1;
}

// The windows of one image.
struct Windows {
  const WindowIndexCall& p;
  const WindowMap& map;
  const int64_t* ids;

  SPADE_DEVICE Windows(const WindowIndexCall& call, const WindowMap& of, int64_t image)
      : p(call), map(of), ids(of.ids + image * of.source_height * of.source_width) {}

  // Tap (i, j) of the window of a pixel; 0 outside the image.
  SPADE_DEVICE int64_t id(uint32_t pixel, uint32_t i, uint32_t j) const {
    const uint32_t y = pixel / map.out_width * p.stride + i - p.padding,
                   x = pixel % map.out_width * p.stride + j - p.padding;
    if (y >= map.height || x >= map.width) return 0;  // above and left of the image, y and x wrap round
    return map.first_id +
           load_constant(ids + static_cast<int64_t>(nearest(y, map.scale_y, map.source_height)) * map.source_width +
                         nearest(x, map.scale_x, map.source_width));
  }
  SPADE_DEVICE bool same(uint32_t a, uint32_t b) const {
    for (uint32_t i = 0; i < p.kernel_size; ++i)
      for (uint32_t j = 0; j < p.kernel_size; ++j)
        if (id(a, i, j) != id(b, i, j)) return false;
    return true;
  }
  SPADE_DEVICE uint32_t hash(uint32_t pixel) const {
    uint64_t h = 0;
    for (uint32_t i = 0; i < p.kernel_size; ++i)
      for (uint32_t j = 0; j < p.kernel_size; ++j) h = (h ^ static_cast<uint64_t>(id(pixel, i, j))) * SPADE_HASH_FACTOR;
    return static_cast<uint32_t>(h >> (64 - map.slot_bits));  // the top bits depend on all ids
  }
};

SPADE_DEVICE uint32_t pixels_of(const WindowMap& map) {
  return map.out_height * map.out_width;
}

SPADE_DEVICE uint32_t* slots_of(const WindowMap& map, uint32_t image) {
  return map.slots + (static_cast<int64_t>(image) << map.slot_bits);
}

// Finds every pixel's slot, and keeps the first pixel of each window there. In an area of equal windows all pixels
// would use the same slot. Therefore a pixel looks for its slot only if its window differs from the window of the pixel
// before it, and the pixels after it take the slot over.
struct Insert {
  static constexpr int kThreads = spade::cuda::kThreads;
  struct Shared {
    uint32_t slot[kThreads];
    uint32_t looked[kThreads / 32];  // a bit for each thread that looked for a slot
  };
  WindowIndexCall p;

  SPADE_DEVICE uint32_t slot_of(const Windows& windows, uint32_t* slots, uint32_t pixel) const {
    const uint32_t mask = (1u << windows.map.slot_bits) - 1;
    for (uint32_t slot = windows.hash(pixel);; slot = (slot + 1) & mask) {
      uint32_t there = load_now(slots + slot);
      if (there == kEmpty) there = compare_and_swap(slots + slot, kEmpty, pixel);
      if (there == kEmpty) return slot;
      if (!windows.same(there, pixel)) continue;
      // Nearly always the slot holds an earlier pixel already, and a load is cheaper than an atomic on a contended
      // slot.
      if (pixel < there) fetch_min(slots + slot, pixel);
      return slot;
    }
  }

  SPADE_DEVICE void operator()(const Block& block, Shared& shared) const {
    const WindowMap& map = p.maps[block.z];
    const uint32_t pixels = pixels_of(map), begin = block.x * block.block_x;
    if (begin >= pixels) return;
    block.phase([&](const Thread& t) {
      if (t.lane < kThreads / 32) shared.looked[t.lane] = 0;
    });
    block.phase([&](const Thread& t) {
      const uint32_t pixel = begin + t.lane;
      const Windows windows(p, map, t.y);
      if (pixel >= pixels || (t.lane > 0 && windows.same(pixel, pixel - 1))) return;
      shared.slot[t.lane] = slot_of(windows, slots_of(map, t.y), pixel);
      fetch_or(&shared.looked[t.lane / 32], 1u << t.lane % 32);
    });
    block.phase([&](const Thread& t) {
      const uint32_t pixel = begin + t.lane;
      if (pixel >= pixels) return;
      uint32_t word = t.lane / 32, looked = shared.looked[word] << (31 - t.lane % 32), last = t.lane;
      if (looked == 0) {
        while (shared.looked[--word] == 0) {
        }
        looked = shared.looked[word];
        last = 32 * word + 31;
      }
      map.pixel_row[static_cast<int64_t>(t.y) * pixels + pixel] = shared.slot[last - count_leading_zeros(looked)];
    });
  }
};

// A run of pixels of one image, for one block: rows that are counted block by block are then in order.
struct Run {
  uint32_t begin, end;

  SPADE_DEVICE Run(const WindowMap& map, uint32_t block) {
    const uint32_t pixels = pixels_of(map), length = (pixels + map.blocks - 1) / map.blocks;
    begin = min(block * length, pixels);
    end = min(begin + length, pixels);
  }
};

// Marks the first pixel of every window by storing ~slot, and counts these pixels.
struct Count {
  static constexpr int kThreads = spade::cuda::kThreads;
  struct Shared {
    uint32_t count;
  };
  WindowIndexCall p;

  SPADE_DEVICE void operator()(const Block& block, Shared& shared) const {
    const WindowMap& map = p.maps[block.z];
    if (block.x >= map.blocks) return;
    const Run run(map, block.x);
    const uint32_t* slots = slots_of(map, block.y);
    int64_t* pixel_row = map.pixel_row + static_cast<int64_t>(block.y) * pixels_of(map);
    block.phase([&](const Thread& t) {
      if (t.lane == 0) shared.count = 0;
    });
    block.phase([&](const Thread& t) {
      uint32_t count = 0;
      for (uint32_t pixel = run.begin + t.lane; pixel < run.end; pixel += t.block_x) {
        const int64_t slot = pixel_row[pixel];
        if (slots[slot] != pixel) continue;
        pixel_row[pixel] = ~slot;
        ++count;
      }
      if (count) fetch_add(&shared.count, count);
    });
    block.phase([&](const Thread& t) {
      if (t.lane == 0) map.counts[block.y * map.blocks + block.x] = shared.count;
    });
  }
};

// Numbers the marked pixels in order, stores the number in the pixel's slot, and the pixel in `firsts`.
struct Number {
  static constexpr int kThreads = spade::cuda::kThreads;
  static constexpr int kMasks = kThreads / 32;
  struct Shared {
    uint32_t before;
    uint32_t first[2][kMasks];  // bits of pixels that are the first of their window, in even and odd turns
  };
  WindowIndexCall p;

  SPADE_DEVICE void operator()(const Block& block, Shared& shared) const {
    const WindowMap& map = p.maps[block.z];
    if (block.x >= map.blocks) return;
    const Run run(map, block.x);
    const uint32_t blocks_before = block.y * map.blocks + block.x, pixels_before = block.y * pixels_of(map);
    uint32_t* slots = slots_of(map, block.y);
    const int64_t* pixel_row = map.pixel_row + static_cast<int64_t>(pixels_before);
    block.phase([&](const Thread& t) {
      if (t.lane == 0) shared.before = 0;
      if (t.lane < 2 * kMasks) shared.first[t.lane / kMasks][t.lane % kMasks] = 0;
    });
    block.phase([&](const Thread& t) {
      uint32_t sum = 0;
      for (uint32_t b = t.lane; b < blocks_before; b += t.block_x) sum += map.counts[b];
      if (sum) fetch_add(&shared.before, sum);
    });
    uint32_t number = shared.before;
    block.phase([&](const Thread& t) {
      if (t.lane != 0) return;
      if (block.x == 0) map.image_offsets[block.y] = number;
      if (blocks_before + 1 == map.blocks * p.images)
        map.image_offsets[p.images] = *map.rows = number + map.counts[blocks_before];
    });
    uint32_t turn = 0;
    for (uint32_t begin = run.begin; begin < run.end; begin += block.block_x, turn ^= 1) {
      uint32_t* first = shared.first[turn];
      block.phase([&](const Thread& t) {
        const uint32_t pixel = begin + t.lane;
        if (pixel < run.end && pixel_row[pixel] < 0) fetch_or(&first[t.lane / 32], 1u << t.lane % 32);
      });
      block.phase([&](const Thread& t) {
        if (t.lane < kMasks) shared.first[turn ^ 1][t.lane] = 0;
        if (!(first[t.lane / 32] >> t.lane % 32 & 1)) return;
        uint32_t row = number + count_bits(first[t.lane / 32] & ((1u << t.lane % 32) - 1));
        for (uint32_t i = 0; i < t.lane / 32; ++i) row += count_bits(first[i]);
        slots[~pixel_row[begin + t.lane]] = row;
        map.firsts[row] = pixels_before + begin + t.lane;
      });
      for (int i = 0; i < kMasks; ++i) number += count_bits(first[i]);
    }
  }
};

// Gives every pixel its row.
struct Look {
  static constexpr int kThreads = spade::cuda::kThreads;
  WindowIndexCall p;

  SPADE_DEVICE void operator()(const Thread& t) const {
    const WindowMap& map = p.maps[t.z];
    const uint32_t pixels = pixels_of(map), pixel = t.x * t.block_x + t.lane;
    if (pixel >= pixels) return;
    int64_t& pixel_row = map.pixel_row[static_cast<int64_t>(t.y) * pixels + pixel];
    pixel_row = slots_of(map, t.y)[pixel_row < 0 ? ~pixel_row : pixel_row];
  }
};

// Gives every row its window; a thread writes one id.
struct Write {
  static constexpr int kThreads = spade::cuda::kThreads;
  WindowIndexCall p;

  SPADE_DEVICE void operator()(const Thread& t) const {
    const WindowMap& map = p.maps[t.z];
    const uint32_t num_taps = p.kernel_size * p.kernel_size, pixels = pixels_of(map);
    const int64_t at = static_cast<int64_t>(t.x) * t.block_x + t.lane;
    if (at >= static_cast<int64_t>(map.num_rows) * num_taps) return;
    const uint32_t first = map.firsts[at / num_taps], tap = at % num_taps;
    const Windows windows(p, map, first / pixels);
    map.windows[at] = windows.id(first % pixels, tap / p.kernel_size, tap % p.kernel_size);
  }
};

// A grid with as many blocks as the map that needs most of them.
template <class Blocks>
Grid over_maps(const WindowIndexCall& p, uint32_t images, const Blocks& blocks) {
  int64_t most = 0;
  for (uint32_t i = 0; i < p.count; ++i) most = std::max<int64_t>(most, blocks(p.maps[i]));
  return {static_cast<uint32_t>(most), images, p.count, kThreads, 1};
}

Grid over_pixels(const WindowIndexCall& p) {
  return over_maps(p, p.images,
                   [](const WindowMap& map) { return ceil_div(map.out_height * map.out_width, kThreads); });
}

}  // namespace

void plan_window_index(const WindowIndexCall& p, WindowMap& map) {
  map.out_height = (map.height + 2 * p.padding - p.kernel_size) / p.stride + 1;
  map.out_width = (map.width + 2 * p.padding - p.kernel_size) / p.stride + 1;
  const int64_t pixels = static_cast<int64_t>(map.out_height) * map.out_width;
  // At least half of the slots stay empty, so every search ends soon.
  for (map.slot_bits = 1; (int64_t{1} << map.slot_bits) < 2 * pixels;) ++map.slot_bits;
  const int64_t most = std::max<int64_t>(kMostBlocks / p.images, 1);
  map.blocks = static_cast<uint32_t>(std::min(ceil_div(pixels, kThreads), most));
  map.scale_y = static_cast<float>(map.source_height) / static_cast<float>(map.height);
  map.scale_x = static_cast<float>(map.source_width) / static_cast<float>(map.width);
}

// Computes pixel_row, image_offsets and the number of rows; write_windows writes the windows themselves.
void number_windows(const WindowIndexCall& p, cudaStream_t stream) {
  size_t slots = 0;
  for (uint32_t i = 0; i < p.count; ++i) slots += static_cast<size_t>(p.images) << p.maps[i].slot_bits;
  fill_bytes(p.maps[0].slots, 0xff, sizeof(uint32_t) * slots, stream);
  const Grid runs = over_maps(p, p.images, [](const WindowMap& map) { return map.blocks; });
  launch(over_pixels(p), stream, Insert{p});
  launch(runs, stream, Count{p});
  launch(runs, stream, Number{p});
  launch(over_pixels(p), stream, Look{p});
}

void write_windows(const WindowIndexCall& p, cudaStream_t stream) {
  const int64_t num_taps = int64_t{p.kernel_size} * p.kernel_size;
  launch(over_maps(p, 1, [&](const WindowMap& map) { return ceil_div(map.num_rows * num_taps, kThreads); }), stream,
         Write{p});
}

namespace {

std::vector<Tensor> window_index_op(const Tensor& ids_in, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                                    int64_t kernel_size, int64_t stride, int64_t padding, int64_t levels) {
  check_window_index(ids_in, sizes, kernel_size, stride, padding, levels);
  const Launch launch(ids_in);
  const Tensor ids = dense(ids_in, ScalarType::Long);
  WindowPlan plan({ids.size(0), ids.size(1), ids.size(2)}, {sizes.begin(), sizes.end()}, kernel_size, stride, padding,
                  levels);
  const Tensor scratch = torch::stable::new_empty(ids, {plan.scratch_size()}, ScalarType::Int);
  plan.divide(static_cast<uint32_t*>(scratch.mutable_data_ptr()));
  std::vector<Tensor> pixel_rows, image_offsets;
  plan.for_each_map([&](WindowMap& map, const WindowMap* before) {
    pixel_rows.push_back(torch::stable::new_empty(ids, {ids.size(0), map.out_height, map.out_width}));
    image_offsets.push_back(torch::stable::new_empty(ids, {ids.size(0) + 1}));
    map.pixel_row = pixel_rows.back().mutable_data_ptr<int64_t>();
    map.image_offsets = image_offsets.back().mutable_data_ptr<int64_t>();
    map.ids = before ? before->pixel_row : ids.const_data_ptr<int64_t>();
    map.first_id = before ? 1 : 0;
  });
  if (pixel_rows.empty()) return {};
  for (const WindowIndexCall& call : plan.calls) number_windows(call, launch.stream());
  launch.check();

  // The host needs the number of rows to allocate the windows: it waits for nothing else.
  std::vector<uint32_t> rows(pixel_rows.size());
  launch.read(rows.data(), plan.calls[0].maps[0].rows, sizeof(uint32_t) * rows.size());
  std::vector<Tensor> results;
  plan.for_each_map([&](WindowMap& map, const WindowMap*) {
    map.num_rows = rows[map.rows - plan.calls[0].maps[0].rows];
    results.push_back(torch::stable::new_empty(ids, {map.num_rows, kernel_size * kernel_size}));
    map.windows = results.back().mutable_data_ptr<int64_t>();
    const size_t i = results.size() / 3;
    results.insert(results.end(), {pixel_rows[i], image_offsets[i]});
  });
  for (const WindowIndexCall& call : plan.calls) write_windows(call, launch.stream());
  launch.check();
  return results;
}

}  // namespace
}  // namespace spade::cuda

STABLE_TORCH_LIBRARY_IMPL(spade_kernels, SPADE_DISPATCH_KEY, m) {
  m.impl("window_index", TORCH_BOX(&spade::cuda::window_index_op));
}
