#pragma once

#include <cstdint>

namespace spade {

// Packed weights are in panels of this many output columns; the last panel is padded with 0.
constexpr int64_t kPanelColumns = 32;

// A matrix with any strides: element (i, j) is data[i * row + j * column].
template <class A>
struct Matrix {
  const A* data;
  int64_t row, column;
};

// A matrix with contiguous rows, whose first elements are `row` apart.
template <class A>
struct Rows {
  const A* data;
  int64_t row;
};

// out (m, n) = a (m, k) @ b (k, n), contiguous, or out += a @ b if `add`. Every element is summed in one fixed order.
void gemm(int64_t m, int64_t n, int64_t k, Matrix<float> a, Rows<float> b, float* out, bool add = false);
void gemm(int64_t m, int64_t n, int64_t k, Matrix<double> a, Rows<double> b, double* out, bool add = false);

// Computes a tile out (rows, columns) = a (rows, depth) @ b (depth, columns), or adds that to out. `a_row`, `b_row` and
// `out_row` are the distances between rows, in elements.
template <class A>
using Tile = void (*)(int64_t depth, const A* a, int64_t a_row, const A* b, int64_t b_row, A* out, int64_t out_row,
                      bool add);

// The fastest tile product of this machine, which holds the tile in registers; `transposed` takes a as (depth, rows).
template <class A>
struct Microkernel {
  int64_t rows, columns;
  Tile<A> tile, transposed;
};

// No microkernel has a larger tile.
constexpr int64_t kMostTileRows = 12, kMostTileColumns = 32;

template <class A>
const Microkernel<A>& microkernel();

}  // namespace spade
