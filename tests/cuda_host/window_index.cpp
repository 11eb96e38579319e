// csrc/cuda/window_index.cu as a host compiler sees it, behind a function that ctypes can call.
#include "window_index.cu"

using namespace spade;
using namespace spade::cuda;

extern "C" {

void run_on(bool in_reverse, int threads) {
  backwards = in_reverse;
  host_threads = threads;
}

// `windows` has room for a row per pixel. Returns the number of rows.
int64_t window_index(const int64_t* ids, const int64_t* shape, const int64_t* size, const int64_t* convolution,
                     int64_t* windows, int64_t* pixel_row, int64_t* image_rows) {
  WindowIndexCall p{};
  p.ids = ids;
  p.windows = windows;
  p.pixel_row = pixel_row;
  p.image_rows = image_rows;
  p.images = shape[0];
  p.source_height = shape[1];
  p.source_width = shape[2];
  p.height = size[0];
  p.width = size[1];
  p.kernel_size = convolution[0];
  p.stride = convolution[1];
  p.padding = convolution[2];
  plan_window_index(p);
  std::vector<uint32_t> slots(p.images << p.slot_bits), counts(p.images * p.blocks);
  p.slots = slots.data();
  p.counts = counts.data();
  number_windows(p, nullptr);
  write_windows(p, nullptr);
  return image_rows[p.images];
}

}  // extern "C"
