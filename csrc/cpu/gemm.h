#pragma once

#include <cstdint>

namespace spade {

// A matrix somewhere in memory: element (i, j) at data[i * row + j * column].
template <class A>
struct Matrix {
  const A* data;
  int64_t row, column;
};

// out (m, n), dense, = a (m, k) @ b (k, n). Every element is summed in one fixed order.
void gemm(int64_t m, int64_t n, int64_t k, Matrix<float> a, Matrix<float> b, float* out);
void gemm(int64_t m, int64_t n, int64_t k, Matrix<double> a, Matrix<double> b, double* out);

}  // namespace spade
