// Access to channels-last tensors, a vector of channels at a time, and the choice of a kernel by dtype.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <type_traits>

#include "../dtype.h"
#include "device.h"

namespace spade::cuda {

template <class T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

constexpr int kAccess = 16;  // bytes a thread reads or writes at once
constexpr int kThreads = 256;

constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

template <int bytes>
struct Word;
template <>
struct Word<16> {
  using type = uint4;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<4> {
  using type = unsigned int;
};
template <>
struct Word<2> {
  using type = unsigned short;
};

// V neighbouring values as they lie in memory.
template <class T, int V>
struct alignas(std::min<int>(kAccess, V * sizeof(T))) Values {
  using W = typename Word<std::min<int>(kAccess, V * sizeof(T))>::type;
  static constexpr int kWords = V * sizeof(T) / sizeof(W);

  T at[V];

  // Loads from memory that no thread of the launch writes.
  SPADE_DEVICE void load(const void* from, int64_t first) {
    const W* words = reinterpret_cast<const W*>(static_cast<const T*>(from) + first);
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const W word = load_constant(words + i);
      memcpy(reinterpret_cast<char*>(at) + i * sizeof(W), &word, sizeof(W));
    }
  }
  SPADE_DEVICE void store(void* to, int64_t first) const {
    W* words = reinterpret_cast<W*>(static_cast<T*>(to) + first);
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      W word;
      memcpy(&word, reinterpret_cast<const char*>(at) + i * sizeof(W), sizeof(W));
      words[i] = word;
    }
  }
};

// A grid over vectors of channels and over images; the caller sets x. A block has `lanes` vectors side by side, and as
// many rows of threads as fit. If the vectors do not fit into one block, the y of the grid counts the blocks.
inline Grid grid_over(int64_t vectors, int64_t most_lanes, int64_t images) {
  const int64_t groups = ceil_div(vectors, most_lanes);
  const auto lanes = static_cast<uint32_t>(ceil_div(vectors, std::max<int64_t>(groups, 1)));
  return {1, static_cast<uint32_t>(groups), static_cast<uint32_t>(images), lanes, kThreads / std::max(lanes, 1u)};
}

template <class T>
struct Type {
  using type = T;
};

// Calls f(Type<T>) for the dtype of x.
template <class F>
void for_dtype(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::f32: return f(Type<float>{});
    case Dtype::f64: return f(Type<double>{});
    case Dtype::bf16: return f(Type<c10::BFloat16>{});
    case Dtype::f16: return f(Type<c10::Half>{});
  }
}

// Calls f(Type<T>, Type<S>) for the dtypes of x and of the table. The table has the dtype of x or the accumulation
// type.
template <class F>
void for_dtypes(Dtype dtype, Dtype table, const F& f) {
  for_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (!std::is_same_v<T, acc_t<T>>)
      if (table == dtype) return f(type, Type<T>{});
    f(type, Type<acc_t<T>>{});
  });
}

// Calls f(integral_constant<V>), where V is the number of channels per access: as many as kAccess bytes hold if the
// number of channels is a multiple of that and the pointers are aligned to kAccess, else 1.
template <class T, class F>
void for_vector(int64_t channels, std::initializer_list<const void*> pointers, const F& f) {
  constexpr int kMost = kAccess / sizeof(T);
  bool fits = channels % kMost == 0;
  for (const void* pointer : pointers) fits = fits && reinterpret_cast<uintptr_t>(pointer) % kAccess == 0;
  fits ? f(std::integral_constant<int, kMost>{}) : f(std::integral_constant<int, 1>{});
}

}  // namespace spade::cuda
