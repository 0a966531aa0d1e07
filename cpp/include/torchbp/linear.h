// Products of matrices that lie in memory row by row.
#pragma once
#include <cstdint>

namespace torchbp {

// c[i][j] = sum over k of a(i, k) b[k][j], where a(i, k) = a[i * row + k * column]: transposed or
// not. Every element adds up its products in one order, however the work is cut.
template <class T>
struct Product {
  const T *a, *b;
  T* c;
  int64_t rows, columns, depth;
  int64_t a_row, a_column;
};

}  // namespace torchbp
