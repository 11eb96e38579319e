// csrc/cuda/window_index.cu as a host compiler sees it, behind functions that ctypes can call.
#include "window_index.cu"

#include "../arguments.cpp"
#include "window_plan.h"

using namespace spade;
using namespace spade::cuda;

extern "C" {

void run_on(bool in_reverse, int threads) {
  backwards = in_reverse;
  host_threads = threads;
}

// shape: of the ids. convolution: kernel_size, stride, padding. results: windows, pixel_row and image_offsets of each
// size and level; `windows` has room for a row per pixel. Writes how many rows there are of each. False: the scratch
// was written outside of.
bool window_index(const int64_t* ids, const int64_t* shape, const int64_t* sizes, int64_t num_sizes,
                  const int64_t* convolution, int64_t levels, int64_t** results, int64_t* num_rows) {
  WindowPlan plan({shape[0], shape[1], shape[2]}, {sizes, sizes + 2 * num_sizes}, convolution[0], convolution[1],
                  convolution[2], levels);
  constexpr int64_t margin = 64;
  constexpr uint32_t unwritten = 0xABABABABu;
  std::vector<uint32_t> scratch(plan.scratch_size() + 2 * margin, unwritten);
  plan.divide(scratch.data() + margin);
  plan.for_each_map([&](WindowMap& map, const WindowMap* before) {
    map.windows = *results++;
    map.pixel_row = *results++;
    map.image_offsets = *results++;
    map.ids = before ? before->pixel_row : ids;
    map.first_id = before ? 1 : 0;
  });
  for (const WindowIndexCall& call : plan.calls) number_windows(call, nullptr);
  plan.for_each_map([&](WindowMap& map, const WindowMap*) { *num_rows++ = map.num_rows = *map.rows; });
  for (const WindowIndexCall& call : plan.calls) write_windows(call, nullptr);
  const auto untouched = [&](auto first) {
    return std::all_of(first, first + margin, [](uint32_t u) { return u == unwritten; });
  };
  return untouched(scratch.begin()) && untouched(scratch.end() - margin);
}

}  // extern "C"
