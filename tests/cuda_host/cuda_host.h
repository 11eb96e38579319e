// csrc/cuda/device.h for a host compiler: a launch is a loop over blocks, a phase a loop over the threads of a block.
// Kernels may rely on no order of either, so both run forwards or backwards, and blocks on several threads if asked.
#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#define SPADE_DEVICE inline

struct CUstream_st;
using cudaStream_t = CUstream_st*;
struct alignas(16) uint4 {
  unsigned int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned int x, y;
};

namespace spade::cuda {

using std::min;

struct Grid {
  uint32_t x, y, z, block_x, block_y;
};

struct Thread {
  uint32_t x, y, z, lane, row, block_x, block_y;
};

// How the next launches run.
inline bool backwards = false;
inline int host_threads = 1;
inline std::atomic<int64_t> launches = 0;

// body(i) for all i below count.
template <class Body>
void in_any_order(uint32_t count, const Body& body) {
  for (uint32_t i = 0; i < count; ++i) body(backwards ? count - 1 - i : i);
}

struct Block {
  uint32_t x, y, z, block_x, block_y;

  template <class Body>
  void phase(const Body& body) const {
    in_any_order(block_x * block_y,
                 [&](uint32_t i) { body(Thread{x, y, z, i % block_x, i / block_x, block_x, block_y}); });
  }
};

template <class Kernel>
void run_block(const Block& block, const Kernel& kernel) {
  if constexpr (requires { typename Kernel::Shared; }) {
    // Whatever a kernel does not write is as good as random on the device.
    alignas(16) unsigned char memory[sizeof(typename Kernel::Shared)];
    std::memset(memory, 0xAB, sizeof(memory));
    kernel(block, *reinterpret_cast<typename Kernel::Shared*>(memory));
  } else {
    block.phase([&](const Thread& thread) { kernel(thread); });
  }
}

template <class Kernel>
void launch(Grid grid, cudaStream_t, const Kernel& kernel) {
  ++launches;
  const uint32_t blocks = grid.x * grid.y * grid.z;
  const auto share = [&](uint32_t first, uint32_t step) {
    in_any_order(blocks, [&](uint32_t i) {
      if (i % step == first)
        run_block({i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y, grid.block_x, grid.block_y}, kernel);
    });
  };
  std::vector<std::thread> threads;
  for (int i = 1; i < host_threads; ++i) threads.emplace_back(share, i, host_threads);
  share(0, host_threads);
  for (std::thread& thread : threads) thread.join();
}

inline void fill_bytes(void* to, int byte, size_t bytes, cudaStream_t) {
  std::memset(to, byte, bytes);
}

inline uint32_t load_now(const uint32_t* at) {
  return __atomic_load_n(at, __ATOMIC_RELAXED);
}
inline uint32_t compare_and_swap(uint32_t* at, uint32_t expected, uint32_t desired) {
  std::atomic_ref<uint32_t>(*at).compare_exchange_strong(expected, desired);
  return expected;
}
inline void fetch_min(uint32_t* at, uint32_t value) {
  std::atomic_ref<uint32_t> there(*at);
  for (uint32_t seen = there; value < seen && !there.compare_exchange_weak(seen, value);) {
  }
}
inline void fetch_add(uint32_t* at, uint32_t value) {
  std::atomic_ref<uint32_t>(*at) += value;
}
inline void fetch_or(uint32_t* at, uint32_t value) {
  std::atomic_ref<uint32_t>(*at) |= value;
}
inline uint32_t count_bits(uint32_t bits) {
  return std::popcount(bits);
}
inline uint32_t count_leading_zeros(uint32_t bits) {
  return std::countl_zero(bits);
}

template <class Word>
Word load_constant(const Word* from) {
  return *from;
}

}  // namespace spade::cuda
