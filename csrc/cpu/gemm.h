#pragma once

#include <cstdint>

namespace spade {

// Weights packed for products stand in panels of this many output columns, the last panel filled with 0.
constexpr int64_t kPanelColumns = 32;

// A matrix somewhere in memory: element (i, j) at data[i * row + j * column].
template <class A>
struct Matrix {
  const A* data;
  int64_t row, column;
};

// A matrix whose rows are dense, `row` apart.
template <class A>
struct Rows {
  const A* data;
  int64_t row;
};

// out (m, n), dense, = a (m, k) @ b (k, n), added to what is there if asked. Every element is summed in one fixed
// order.
void gemm(int64_t m, int64_t n, int64_t k, Matrix<float> a, Rows<float> b, float* out, bool add = false);
void gemm(int64_t m, int64_t n, int64_t k, Matrix<double> a, Rows<double> b, double* out, bool add = false);

// A tile out (rows, columns), or added to it, = a @ b from a (rows, depth) and b (depth, columns). `a_row`, `b_row` and
// `out_row` say how far apart the rows are.
template <class A>
using Tile = void (*)(int64_t depth, const A* a, int64_t a_row, const A* b, int64_t b_row, A* out, int64_t out_row,
                      bool add);

// The fastest tile product of this machine, which holds the tile in registers; `transposed` takes a as (depth, rows).
template <class A>
struct Microkernel {
  int64_t rows, columns;
  Tile<A> tile, transposed;
};

// No tile is larger.
constexpr int64_t kMostTileRows = 12, kMostTileColumns = 32;

template <class A>
const Microkernel<A>& microkernel();

}  // namespace spade
