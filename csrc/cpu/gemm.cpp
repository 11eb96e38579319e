// A packed matrix product. torch's CPU product is tuned for other machines: on AMD ones this is about twice as fast.
#include "gemm.h"

#include <array>

#include "scratch.h"
#include "vector.h"

namespace spade {
namespace {

constexpr int64_t kDepth = 256;  // of a block; blocks are added up, which also keeps rounding errors from growing
constexpr int64_t kTileRows = 96;
constexpr int64_t kTileColumns = 256;

// A tile of `rows` x (vectors * lanes) kept in registers, fed from packed panels a (depth, rows), b (depth, columns).
template <class A, int lanes, int rows, int vectors>
SPADE_INLINE void tile(int64_t depth, const A* a, const A* b, A* out) {
  typedef A Vector __attribute__((vector_size(lanes * sizeof(A)), aligned(sizeof(A))));
  Vector sum[rows][vectors] = {};
  for (int64_t d = 0; d < depth; ++d) {
    Vector from[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) from[v] = *reinterpret_cast<const Vector*>(b + (d * vectors + v) * lanes);
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sum[r][v] += a[d * rows + r] * from[v];
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) *reinterpret_cast<Vector*>(out + (r * vectors + v) * lanes) = sum[r][v];
}

// What an instruction set multiplies with: the shape of its register tile, and the tile.
template <class A>
struct Kernel {
  int64_t rows, columns;
  void (*tile)(int64_t depth, const A* a, const A* b, A* out);
};

#if defined(__x86_64__) && defined(__GNUC__) && !defined(SPADE_ONE_TARGET)
#define SPADE_TILE(name, cpu, A, lanes, rows, vectors)                                            \
  __attribute__((target("arch=" cpu))) void name(int64_t depth, const A* a, const A* b, A* out) { \
    tile<A, lanes, rows, vectors>(depth, a, b, out);                                              \
  }
SPADE_TILE(tile_v4_f32, "x86-64-v4", float, 16, 12, 2)
SPADE_TILE(tile_v4_f64, "x86-64-v4", double, 8, 12, 2)
SPADE_TILE(tile_v3_f32, "x86-64-v3", float, 8, 6, 2)
SPADE_TILE(tile_v3_f64, "x86-64-v3", double, 4, 6, 2)
#undef SPADE_TILE
#endif

template <class A>
void tile_any(int64_t depth, const A* a, const A* b, A* out) {
  tile<A, 16 / sizeof(A), 4, 2>(depth, a, b, out);
}

template <class A>
Kernel<A> choose() {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(SPADE_ONE_TARGET)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) {
    if constexpr (sizeof(A) == 4)
      return {12, 32, tile_v4_f32};
    else
      return {12, 16, tile_v4_f64};
  }
  if (__builtin_cpu_supports("x86-64-v3")) {
    if constexpr (sizeof(A) == 4)
      return {6, 16, tile_v3_f32};
    else
      return {6, 8, tile_v3_f64};
  }
#endif
  return {4, 32 / static_cast<int64_t>(sizeof(A)), tile_any<A>};
}

// Panels of `width` rows (of a) or columns (of b), each (depth, width); what lies past `count` is zero.
template <class A>
void pack(const A* from, int64_t along, int64_t down, int64_t count, int64_t depth, int64_t width, A* to) {
  for (int64_t first = 0; first < count; first += width) {
    const int64_t valid = std::min(width, count - first);
    if (valid < width) std::fill_n(to, width * depth, A(0));
    const A* corner = from + first * along;
    if (down == 1)
      for (int64_t i = 0; i < valid; ++i)
        for (int64_t d = 0; d < depth; ++d) to[d * width + i] = corner[i * along + d];
    else
      for (int64_t d = 0; d < depth; ++d)
        for (int64_t i = 0; i < valid; ++i) to[d * width + i] = corner[d * down + i * along];
    to += width * depth;
  }
}

int64_t round_up(int64_t value, int64_t step) {
  return (value + step - 1) / step * step;
}

template <class A>
void multiply(int64_t m, int64_t n, int64_t k, Matrix<A> a, Matrix<A> b, A* out) {
  static const Kernel<A> kernel = choose<A>();
  std::fill_n(out, k == 0 ? m * n : 0, A(0));
  const Scratch<A> packed_b(kDepth * round_up(n, kernel.columns));
  const int64_t column_tiles = (n + kTileColumns - 1) / kTileColumns, row_tiles = (m + kTileRows - 1) / kTileRows;
  for (int64_t block = 0; block < k; block += kDepth) {
    const int64_t depth = std::min(kDepth, k - block);
    in_pieces(n, kTileColumns, [&](int64_t begin, int64_t end) {
      pack(b.data + block * b.row + begin * b.column, b.column, b.row, end - begin, depth, kernel.columns,
           packed_b.data() + begin * depth);
    });
    in_pieces(row_tiles * column_tiles, 1, [&](int64_t task, int64_t) {
      const int64_t top = task / column_tiles * kTileRows, left = task % column_tiles * kTileColumns;
      const int64_t bottom = std::min(top + kTileRows, m), right = std::min(left + kTileColumns, n);
      const Scratch<A> packed_a(round_up(kTileRows, kernel.rows) * depth);
      pack(a.data + top * a.row + block * a.column, a.row, a.column, bottom - top, depth, kernel.rows, packed_a.data());
      std::array<A, 12 * 32> sums;
      for (int64_t j = left; j < right; j += kernel.columns)
        for (int64_t i = top; i < bottom; i += kernel.rows) {
          kernel.tile(depth, packed_a.data() + (i - top) * depth, packed_b.data() + j * depth, sums.data());
          const int64_t rows = std::min(kernel.rows, bottom - i), columns = std::min(kernel.columns, right - j);
          for (int64_t r = 0; r < rows; ++r) {
            A* to = out + (i + r) * n + j;
            const A* from = sums.data() + r * kernel.columns;
            for (int64_t c = 0; c < columns; ++c) to[c] = block == 0 ? from[c] : to[c] + from[c];
          }
        }
    });
  }
}

}  // namespace

void gemm(int64_t m, int64_t n, int64_t k, Matrix<float> a, Matrix<float> b, float* out) {
  multiply(m, n, k, a, b, out);
}

void gemm(int64_t m, int64_t n, int64_t k, Matrix<double> a, Matrix<double> b, double* out) {
  multiply(m, n, k, a, b, out);
}

}  // namespace spade
