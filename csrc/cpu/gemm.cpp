// A packed matrix product. torch's CPU product is tuned for other machines: on AMD processors this one is about twice
// as fast.
#include "gemm.h"

#include <array>

#include "scratch.h"
#include "vector.h"

namespace spade {
namespace {

// The number of products that are summed in registers before they are added to out: longer sums would lose digits.
constexpr int64_t kDepth = 32;
// Rows of a task: tasks with few rows read b too often, and tasks with many leave threads idle.
constexpr int64_t kFewestRows = 24, kMostRows = 96;
constexpr int64_t kTasks = 8;

// A tile of `rows` x (vectors * lanes): see Tile.
template <class A, int lanes, int rows, int vectors, bool transposed>
SPADE_INLINE void multiply_tile(int64_t depth, const A* a, int64_t a_row, const A* b, int64_t b_row, A* out,
                                int64_t out_row, bool add) {
  typedef A Vector __attribute__((vector_size(lanes * sizeof(A)), aligned(sizeof(A))));
  Vector sum[rows][vectors] = {};
  for (int64_t d = 0; d < depth; ++d) {
    Vector from[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) from[v] = *reinterpret_cast<const Vector*>(b + d * b_row + v * lanes);
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sum[r][v] += a[transposed ? d * a_row + r : r * a_row + d] * from[v];
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
#define SPADE_TILE(name, cpu, A, lanes, rows)                                                                         \
  template <bool transposed>                                                                                          \
  __attribute__((target("arch=" cpu))) void name(int64_t depth, const A* a, int64_t a_row, const A* b, int64_t b_row, \
                                                 A* out, int64_t out_row, bool add) {                                 \
    multiply_tile<A, lanes, rows, 2, transposed>(depth, a, a_row, b, b_row, out, out_row, add);                       \
  }
SPADE_TILE(tile_v4, "x86-64-v4", float, 16, 12)
SPADE_TILE(tile_v4, "x86-64-v4", double, 8, 12)
SPADE_TILE(tile_v3, "x86-64-v3", float, 8, 6)
SPADE_TILE(tile_v3, "x86-64-v3", double, 4, 6)
#undef SPADE_TILE
#endif

template <class A, bool transposed>
void tile_any(int64_t depth, const A* a, int64_t a_row, const A* b, int64_t b_row, A* out, int64_t out_row, bool add) {
  multiply_tile<A, 16 / sizeof(A), 4, 2, transposed>(depth, a, a_row, b, b_row, out, out_row, add);
}

template <class A>
Microkernel<A> choose() {
  constexpr int64_t size = sizeof(A);
#if defined(__x86_64__) && defined(__GNUC__) && !defined(SPADE_ONE_TARGET)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return {12, 128 / size, tile_v4<false>, tile_v4<true>};
  if (__builtin_cpu_supports("x86-64-v3")) return {6, 64 / size, tile_v3<false>, tile_v3<true>};
#endif
  return {4, 32 / size, tile_any<A, false>, tile_any<A, true>};
}

int64_t round_up(int64_t value, int64_t step) {
  return ceil_div(value, step) * step;
}

// to (rows, to_row) = from (rows, columns), zero past the last column.
template <class A>
void copy_block(Matrix<A> from, int64_t rows, int64_t columns, A* to, int64_t to_row) {
  if (columns < to_row) std::fill_n(to, rows * to_row, A(0));
  if (from.column == 1)
    for (int64_t i = 0; i < rows; ++i) std::copy_n(from.data + i * from.row, columns, to + i * to_row);
  else
    for (int64_t j = 0; j < columns; ++j)
      for (int64_t i = 0; i < rows; ++i) to[i * to_row + j] = from.data[j * from.column + i * from.row];
}

// Computes the rows [top, bottom) of out from all of b, so that no thread waits for another between two blocks of
// depth.
template <class A>
void multiply_rows(int64_t top, int64_t bottom, int64_t n, int64_t k, Matrix<A> a, Rows<A> b, A* out, bool add) {
  const Microkernel<A>& kernel = microkernel<A>();
  const int64_t padded = round_up(bottom - top, kernel.rows);
  const Scratch<A> packed_a(padded * kDepth);
  std::fill_n(packed_a.data(), padded * kDepth, A(0));
  std::array<A, kDepth * kMostTileColumns> edge;
  std::array<A, kMostTileRows * kMostTileColumns> sums;
  for (int64_t block = 0; block < k; block += kDepth) {
    const int64_t depth = std::min(kDepth, k - block);
    const bool more = add || block > 0;
    copy_block({a.data + top * a.row + block * a.column, a.row, a.column}, bottom - top, depth, packed_a.data(),
               kDepth);
    for (int64_t j = 0; j < n; j += kernel.columns) {
      const int64_t columns = std::min(kernel.columns, n - j);
      const A* from_b = b.data + block * b.row + j;
      int64_t b_row = b.row;
      if (columns < kernel.columns) {
        copy_block({from_b, b.row, 1}, depth, columns, edge.data(), kernel.columns);
        from_b = edge.data();
        b_row = kernel.columns;
      }
      for (int64_t i = top; i < bottom; i += kernel.rows) {
        const A* from_a = packed_a.data() + (i - top) * kDepth;
        const int64_t rows = std::min(kernel.rows, bottom - i);
        A* to = out + i * n + j;
        if (rows == kernel.rows && columns == kernel.columns) {
          kernel.tile(depth, from_a, kDepth, from_b, b_row, to, n, more);
          continue;
        }
        kernel.tile(depth, from_a, kDepth, from_b, b_row, sums.data(), kernel.columns, false);
        for (int64_t r = 0; r < rows; ++r, to += n)
          for (int64_t c = 0; c < columns; ++c) {
            const A sum = sums[r * kernel.columns + c];
            to[c] = more ? to[c] + sum : sum;
          }
      }
    }
  }
}

template <class A>
void multiply(int64_t m, int64_t n, int64_t k, Matrix<A> a, Rows<A> b, A* out, bool add) {
  if (k == 0 && !add) std::fill_n(out, m * n, A(0));
  const int64_t task_rows = std::clamp(round_up(ceil_div(m, kTasks), microkernel<A>().rows), kFewestRows, kMostRows);
  parallel_for_chunks(m, task_rows,
                      [&](int64_t top, int64_t bottom) { multiply_rows(top, bottom, n, k, a, b, out, add); });
}

}  // namespace

template <class A>
const Microkernel<A>& microkernel() {
  static const Microkernel<A> kernel = choose<A>();
  return kernel;
}
template const Microkernel<float>& microkernel();
template const Microkernel<double>& microkernel();

void gemm(int64_t m, int64_t n, int64_t k, Matrix<float> a, Rows<float> b, float* out, bool add) {
  multiply(m, n, k, a, b, out, add);
}

void gemm(int64_t m, int64_t n, int64_t k, Matrix<double> a, Rows<double> b, double* out, bool add) {
  multiply(m, n, k, a, b, out, add);
}

}  // namespace spade
