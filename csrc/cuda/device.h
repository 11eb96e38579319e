// The part of CUDA that kernels use: threads, phases, atomics, launches. tests/cuda_host/cuda_host.h has the same
// interface for a host compiler, so that tests can run every kernel here on the CPU, one thread at a time.
//
// A kernel is a struct of its parameters. It has an operator() for one thread, or for one block if threads exchange
// data: after each phase of a block, all threads see all writes to Shared.
#pragma once

#ifndef __CUDACC__
#include <cuda_host.h>
#else
#include <cuda_runtime.h>

#include <cstdint>

#define SPADE_DEVICE __device__ __forceinline__

namespace spade::cuda {

// The blocks of a launch, and the threads of a block.
struct Grid {
  uint32_t x, y, z, block_x, block_y;
};

// One thread: its block's place in the grid, and its own in the block.
struct Thread {
  uint32_t x = blockIdx.x, y = blockIdx.y, z = blockIdx.z, lane = threadIdx.x, row = threadIdx.y;
  uint32_t block_x = blockDim.x, block_y = blockDim.y;
};

struct Block {
  uint32_t x = blockIdx.x, y = blockIdx.y, z = blockIdx.z, block_x = blockDim.x, block_y = blockDim.y;

  template <class Body>
  SPADE_DEVICE void phase(const Body& body) const {
    body(Thread{});
    __syncthreads();
  }
};

// Two blocks of 256 on a multiprocessor keep enough loads in flight. Without this bound ptxas spills to fit more
// blocks.
template <class Kernel>
__global__ __launch_bounds__(Kernel::kThreads, Kernel::kThreads <= 512
                                                   ? 512 / Kernel::kThreads
                                                   : 1) void run(const __grid_constant__ Kernel kernel) {
  if constexpr (requires { typename Kernel::Shared; }) {
    __shared__ typename Kernel::Shared shared;
    kernel(Block{}, shared);
  } else {
    kernel(Thread{});
  }
}

template <class Kernel>
void launch(Grid grid, cudaStream_t stream, const Kernel& kernel) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  void* arguments[] = {const_cast<Kernel*>(&kernel)};
  cudaLaunchKernel(run<Kernel>, dim3(grid.x, grid.y, grid.z), dim3(grid.block_x, grid.block_y), arguments, 0, stream);
}

inline void fill_bytes(void* to, int byte, size_t bytes, cudaStream_t stream) {
  cudaMemsetAsync(to, byte, bytes, stream);
}

SPADE_DEVICE uint32_t load_now(const uint32_t* at) {
  return *const_cast<const volatile uint32_t*>(at);
}
SPADE_DEVICE uint32_t compare_and_swap(uint32_t* at, uint32_t expected, uint32_t desired) {
  return atomicCAS(at, expected, desired);
}
SPADE_DEVICE void fetch_min(uint32_t* at, uint32_t value) {
  atomicMin(at, value);
}
SPADE_DEVICE void fetch_add(uint32_t* at, uint32_t value) {
  atomicAdd(at, value);
}
SPADE_DEVICE void fetch_or(uint32_t* at, uint32_t value) {
  atomicOr(at, value);
}
SPADE_DEVICE uint32_t count_bits(uint32_t bits) {
  return __popc(bits);
}
SPADE_DEVICE uint32_t count_leading_zeros(uint32_t bits) {
  return __clz(bits);
}

// Reads memory that no thread of the launch writes.
template <class Word>
SPADE_DEVICE Word load_constant(const Word* from) {
  return __ldg(from);
}

}  // namespace spade::cuda
#endif
