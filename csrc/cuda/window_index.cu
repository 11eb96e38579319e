// Distinct windows by an open-addressing table of pixels, one region for each image. A slot holds a pixel, which stands
// for its window: two windows are the same only if all their ids are, whatever those are, and whichever pixel a slot
// holds says the same. A slot ends up with the first pixel of its window, so rows are numbered alike in every run.
#include "access.h"
#include "kernels.h"

namespace spade::cuda {
namespace {

// A test makes it 0: then every window looks for its slot in the same place.
#ifndef SPADE_HASH_FACTOR
#define SPADE_HASH_FACTOR 0x9E3779B97F4A7C15ull
#endif

constexpr uint32_t kEmpty = 0xffffffffu;
constexpr uint32_t kMostBlocks = 1024;  // each adds up the counts of all before it

// The source index of a target index, as F.interpolate(mode="nearest") computes it.
SPADE_DEVICE uint32_t nearest(uint32_t i, float scale, uint32_t source) {
  const auto found = static_cast<uint32_t>(static_cast<float>(i) * scale);
  return found < source ? found : source - 1;
}

// The windows of one image.
struct Windows {
  const WindowIndexCall& p;
  const int64_t* ids;

  SPADE_DEVICE Windows(const WindowIndexCall& params, int64_t image)
      : p(params), ids(params.ids + image * params.source_height * params.source_width) {}

  // Tap (i, j) of the window of a pixel; 0 outside the image.
  SPADE_DEVICE int64_t id(uint32_t pixel, uint32_t i, uint32_t j) const {
    const uint32_t y = pixel / p.out_width * p.stride + i - p.padding,
                   x = pixel % p.out_width * p.stride + j - p.padding;
    if (y >= p.height || x >= p.width) return 0;  // above and left of the image they wrap round
    return load_constant(ids + static_cast<int64_t>(nearest(y, p.scale_y, p.source_height)) * p.source_width +
                         nearest(x, p.scale_x, p.source_width));
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
    return static_cast<uint32_t>(h >> (64 - p.slot_bits));  // the top bits depend on all ids
  }
};

// Finds every pixel's slot, keeping the first pixel of each window there.
struct Insert {
  static constexpr int kThreads = spade::cuda::kThreads;
  WindowIndexCall p;

  SPADE_DEVICE void operator()(const Thread& t) const {
    const uint32_t pixels = p.out_height * p.out_width, pixel = t.x * t.lanes + t.lane;
    if (pixel >= pixels) return;
    const Windows windows(p, t.y);
    uint32_t* slots = p.slots + (static_cast<int64_t>(t.y) << p.slot_bits);
    const uint32_t mask = (1u << p.slot_bits) - 1;
    uint32_t slot = windows.hash(pixel);
    for (;; slot = (slot + 1) & mask) {
      uint32_t there = load_now(slots + slot);
      if (there == kEmpty) there = compare_and_swap(slots + slot, kEmpty, pixel);
      if (there == kEmpty) break;
      if (!windows.same(there, pixel)) continue;
      // Nearly always the first is there already, and a load is cheaper than an atomic on a slot that many want.
      if (pixel < there) fetch_min(slots + slot, pixel);
      break;
    }
    p.pixel_row[static_cast<int64_t>(t.y) * pixels + pixel] = slot;
  }
};

// The pixels of one block: a run of one image, so that rows counted block by block are in order.
struct Run {
  uint32_t begin, end;

  SPADE_DEVICE Run(const WindowIndexCall& p, uint32_t block) {
    const uint32_t pixels = p.out_height * p.out_width, length = (pixels + p.blocks - 1) / p.blocks;
    begin = min(block * length, pixels);
    end = min(begin + length, pixels);
  }
};

// Marks the first pixel of every window, by ~slot, and counts them.
struct Count {
  static constexpr int kThreads = spade::cuda::kThreads;
  struct Shared {
    uint32_t count;
  };
  WindowIndexCall p;

  SPADE_DEVICE void operator()(const Block& block, Shared& shared) const {
    const Run run(p, block.x);
    const uint32_t* slots = p.slots + (static_cast<int64_t>(block.y) << p.slot_bits);
    int64_t* pixel_row = p.pixel_row + static_cast<int64_t>(block.y) * p.out_height * p.out_width;
    block.phase([&](const Thread& t) {
      if (t.lane == 0) shared.count = 0;
    });
    block.phase([&](const Thread& t) {
      uint32_t count = 0;
      for (uint32_t pixel = run.begin + t.lane; pixel < run.end; pixel += t.lanes) {
        const int64_t slot = pixel_row[pixel];
        if (slots[slot] != pixel) continue;
        pixel_row[pixel] = ~slot;
        ++count;
      }
      if (count) fetch_add(&shared.count, count);
    });
    block.phase([&](const Thread& t) {
      if (t.lane == 0) p.counts[block.y * p.blocks + block.x] = shared.count;
    });
  }
};

// Numbers the marked pixels in order and leaves the number in their slot.
struct Number {
  static constexpr int kThreads = spade::cuda::kThreads;
  static constexpr int kMasks = kThreads / 32;
  struct Shared {
    uint32_t before;
    uint32_t first[2][kMasks];  // a bit for each of the pixels at hand, for even and odd turns
  };
  WindowIndexCall p;

  SPADE_DEVICE void operator()(const Block& block, Shared& shared) const {
    const Run run(p, block.x);
    const uint32_t blocks_before = block.y * p.blocks + block.x;
    uint32_t* slots = p.slots + (static_cast<int64_t>(block.y) << p.slot_bits);
    const int64_t* pixel_row = p.pixel_row + static_cast<int64_t>(block.y) * p.out_height * p.out_width;
    block.phase([&](const Thread& t) {
      if (t.lane == 0) shared.before = 0;
      if (t.lane < 2 * kMasks) shared.first[t.lane / kMasks][t.lane % kMasks] = 0;
    });
    block.phase([&](const Thread& t) {
      uint32_t sum = 0;
      for (uint32_t b = t.lane; b < blocks_before; b += t.lanes) sum += p.counts[b];
      if (sum) fetch_add(&shared.before, sum);
    });
    uint32_t number = shared.before;
    block.phase([&](const Thread& t) {
      if (t.lane != 0) return;
      if (block.x == 0) p.image_rows[block.y] = number;
      if (blocks_before + 1 == p.blocks * p.images) p.image_rows[p.images] = number + p.counts[blocks_before];
    });
    uint32_t turn = 0;
    for (uint32_t begin = run.begin; begin < run.end; begin += block.lanes, turn ^= 1) {
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
      });
      for (int i = 0; i < kMasks; ++i) number += count_bits(first[i]);
    }
  }
};

// Gives every pixel its row, and every row its window.
struct Write {
  static constexpr int kThreads = spade::cuda::kThreads;
  WindowIndexCall p;

  SPADE_DEVICE void operator()(const Thread& t) const {
    const uint32_t pixels = p.out_height * p.out_width, pixel = t.x * t.lanes + t.lane;
    if (pixel >= pixels) return;
    int64_t& pixel_row = p.pixel_row[static_cast<int64_t>(t.y) * pixels + pixel];
    const bool first = pixel_row < 0;
    const int64_t row = p.slots[(static_cast<int64_t>(t.y) << p.slot_bits) + (first ? ~pixel_row : pixel_row)];
    pixel_row = row;
    if (!first) return;
    const Windows windows(p, t.y);
    int64_t* to = p.windows + row * p.kernel_size * p.kernel_size;
    for (uint32_t i = 0; i < p.kernel_size; ++i)
      for (uint32_t j = 0; j < p.kernel_size; ++j) *to++ = windows.id(pixel, i, j);
  }
};

Grid over_pixels(const WindowIndexCall& p) {
  const int64_t blocks = ceil_div(static_cast<int64_t>(p.out_height) * p.out_width, kThreads);
  return {static_cast<uint32_t>(blocks), static_cast<uint32_t>(p.images), 1, kThreads, 1};
}

}  // namespace

void plan_window_index(WindowIndexCall& p) {
  p.out_height = (p.height + 2 * p.padding - p.kernel_size) / p.stride + 1;
  p.out_width = (p.width + 2 * p.padding - p.kernel_size) / p.stride + 1;
  const int64_t pixels = static_cast<int64_t>(p.out_height) * p.out_width;
  // At least half of the slots stay empty, so every search ends, and soon.
  for (p.slot_bits = 1; (int64_t{1} << p.slot_bits) < 2 * pixels;) ++p.slot_bits;
  const int64_t most = std::max<int64_t>(kMostBlocks / p.images, 1);
  p.blocks = static_cast<uint32_t>(std::min(ceil_div(pixels, kThreads), most));
  p.scale_y = static_cast<float>(p.source_height) / static_cast<float>(p.height);
  p.scale_x = static_cast<float>(p.source_width) / static_cast<float>(p.width);
}

void number_windows(const WindowIndexCall& p, Stream stream) {
  fill_bytes(p.slots, 0xff, sizeof(uint32_t) * (p.images << p.slot_bits), stream);
  launch(over_pixels(p), stream, Insert{p});
  const Grid runs{p.blocks, static_cast<uint32_t>(p.images), 1, kThreads, 1};
  launch(runs, stream, Count{p});
  launch(runs, stream, Number{p});
}

void write_windows(const WindowIndexCall& p, Stream stream) {
  launch(over_pixels(p), stream, Write{p});
}

}  // namespace spade::cuda
