// A packed matrix product. torch's CPU product is tuned for other machines: on AMD ones this is about twice as fast.
#include "gemm.h"

#include <array>

#include "scratch.h"
#include "vector.h"

namespace spade {
namespace {

// Products added up in registers before they are added to the rest: longer sums of one running total lose digits.
constexpr int64_t kDepth = 32;
constexpr int64_t kMostRows = 96;  // of a task, fewer where there would be too few tasks
constexpr int64_t kTasks = 8;
constexpr int64_t kTileColumns = 256;

// A tile of `rows` x (vectors * lanes): see Microkernel.
template <class A, int lanes, int rows, int vectors>
SPADE_INLINE void tile(int64_t depth, const A* a, const A* b, int64_t b_row, A* out, int64_t out_row, bool add) {
  typedef A Vector __attribute__((vector_size(lanes * sizeof(A)), aligned(sizeof(A))));
  Vector sum[rows][vectors] = {};
  for (int64_t d = 0; d < depth; ++d) {
    Vector from[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) from[v] = *reinterpret_cast<const Vector*>(b + d * b_row + v * lanes);
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sum[r][v] += a[d * rows + r] * from[v];
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      Vector* to = reinterpret_cast<Vector*>(out + r * out_row + v * lanes);
      *to = add ? *to + sum[r][v] : sum[r][v];
    }
}

#if defined(__x86_64__) && defined(__GNUC__) && !defined(SPADE_ONE_TARGET)
#define SPADE_TILE(name, cpu, A, lanes, rows, vectors)                                                         \
  __attribute__((target("arch=" cpu))) void name(int64_t depth, const A* a, const A* b, int64_t b_row, A* out, \
                                                 int64_t out_row, bool add) {                                  \
    tile<A, lanes, rows, vectors>(depth, a, b, b_row, out, out_row, add);                                      \
  }
SPADE_TILE(tile_v4_f32, "x86-64-v4", float, 16, 12, 2)
SPADE_TILE(tile_v4_f64, "x86-64-v4", double, 8, 12, 2)
SPADE_TILE(tile_v3_f32, "x86-64-v3", float, 8, 6, 2)
SPADE_TILE(tile_v3_f64, "x86-64-v3", double, 4, 6, 2)
#undef SPADE_TILE
#endif

template <class A>
void tile_any(int64_t depth, const A* a, const A* b, int64_t b_row, A* out, int64_t out_row, bool add) {
  tile<A, 16 / sizeof(A), 4, 2>(depth, a, b, b_row, out, out_row, add);
}

template <class A>
Microkernel<A> choose() {
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

int64_t round_up(int64_t value, int64_t step) {
  return (value + step - 1) / step * step;
}

template <class A>
void multiply(int64_t m, int64_t n, int64_t k, Matrix<A> a, Matrix<A> b, A* out, bool add) {
  const Microkernel<A>& kernel = microkernel<A>();
  if (!add) std::fill_n(out, k == 0 ? m * n : 0, A(0));
  const Scratch<A> packed_b(kDepth * round_up(n, kernel.columns));
  const int64_t task_rows = std::min(round_up((m + kTasks - 1) / kTasks, kernel.rows), kMostRows);
  const int64_t column_tiles = (n + kTileColumns - 1) / kTileColumns, row_tiles = (m + task_rows - 1) / task_rows;
  for (int64_t block = 0; block < k; block += kDepth) {
    const int64_t depth = std::min(kDepth, k - block);
    const bool more = add || block > 0;
    in_pieces(n, kernel.columns, [&](int64_t begin, int64_t end) {
      pack(b.data + block * b.row + begin * b.column, b.column, b.row, end - begin, depth, kernel.columns,
           packed_b.data() + begin * depth);
    });
    in_pieces(row_tiles * column_tiles, 1, [&](int64_t task, int64_t) {
      const int64_t top = task / column_tiles * task_rows, left = task % column_tiles * kTileColumns;
      const int64_t bottom = std::min(top + task_rows, m), right = std::min(left + kTileColumns, n);
      const Scratch<A> packed_a(task_rows * depth);
      pack(a.data + top * a.row + block * a.column, a.row, a.column, bottom - top, depth, kernel.rows, packed_a.data());
      std::array<A, kMostTileRows * kMostTileColumns> sums;
      for (int64_t j = left; j < right; j += kernel.columns)
        for (int64_t i = top; i < bottom; i += kernel.rows) {
          const A *from_a = packed_a.data() + (i - top) * depth, *from_b = packed_b.data() + j * depth;
          const int64_t rows = std::min(kernel.rows, bottom - i), columns = std::min(kernel.columns, right - j);
          A* to = out + i * n + j;
          if (rows == kernel.rows && columns == kernel.columns) {
            kernel.tile(depth, from_a, from_b, kernel.columns, to, n, more);
            continue;
          }
          kernel.tile(depth, from_a, from_b, kernel.columns, sums.data(), kernel.columns, false);
          for (int64_t r = 0; r < rows; ++r, to += n)
            for (int64_t c = 0; c < columns; ++c) {
              const A sum = sums[r * kernel.columns + c];
              to[c] = more ? to[c] + sum : sum;
            }
        }
    });
  }
}

}  // namespace

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
template void pack(const float*, int64_t, int64_t, int64_t, int64_t, int64_t, float*);
template void pack(const double*, int64_t, int64_t, int64_t, int64_t, int64_t, double*);

template <class A>
const Microkernel<A>& microkernel() {
  static const Microkernel<A> kernel = choose<A>();
  return kernel;
}
template const Microkernel<float>& microkernel();
template const Microkernel<double>& microkernel();

void gemm(int64_t m, int64_t n, int64_t k, Matrix<float> a, Matrix<float> b, float* out, bool add) {
  multiply(m, n, k, a, b, out, add);
}

void gemm(int64_t m, int64_t n, int64_t k, Matrix<double> a, Matrix<double> b, double* out, bool add) {
  multiply(m, n, k, a, b, out, add);
}

}  // namespace spade
