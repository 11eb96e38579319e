// Memory that is kept between calls: on Linux, the page faults of new memory cost as much as the arithmetic in it.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

namespace spade {

struct KeptBuffer {
  std::unique_ptr<char[]> memory;
  size_t bytes = 0;
};

inline std::vector<KeptBuffer>& kept_buffers() {
  thread_local std::vector<KeptBuffer> kept;
  return kept;
}

// An uninitialized buffer of `count` values, from memory that earlier buffers of this thread have released.
template <class A>
class Scratch {
 public:
  explicit Scratch(int64_t count) {
    const size_t bytes = static_cast<size_t>(count) * sizeof(A);
    auto& kept = kept_buffers();
    if (!kept.empty()) {
      buffer_ = std::move(kept.back());
      kept.pop_back();
    }
    if (buffer_.bytes < bytes) buffer_ = {std::unique_ptr<char[]>(new char[bytes]), bytes};
  }
  ~Scratch() {
    if (buffer_.bytes <= kMostKept) kept_buffers().push_back(std::move(buffer_));
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  A* data() const {
    return reinterpret_cast<A*>(buffer_.memory.get());
  }

 private:
  static constexpr size_t kMostKept = size_t{64} << 20;
  KeptBuffer buffer_;
};

}  // namespace spade
