#include "torchbp/linear.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/isa.h"
#include "torchbp/tensor.h"

namespace torchbp {

template <class T>
using TileLoop = void (*)(const T*, int64_t, const T*, int64_t, int64_t, bool, T*, int64_t);
template <class T>
struct TileLoops {
  void (*pack_rows)(const T*, int64_t, int64_t, int64_t, int64_t, T*);
  void (*pack_columns)(const T*, int64_t, int64_t, int64_t, T*);
  const TileLoop<T>* tile[2];  // by the vectors of a panel of b, then by the rows of one of a
  int64_t highest, lanes;
};

}  // namespace torchbp

#define TORCHBP_LOOPS "cpu/linear_loops.inc"
#include "cpu/each_isa.inc"

namespace torchbp {

// Panels of b of that size stay in the second cache, a panel of a in the first one.
static constexpr int64_t depth_at_once = 256, columns_at_once = 512;
static constexpr int64_t small_matrix = 16 << 10;  // bytes

// Memory that a thread keeps for its panels: fresh pages would cost as much as packing.
template <class T>
static T* scratch(int64_t count) {
  thread_local std::unique_ptr<T[]> memory;
  thread_local int64_t size = 0;
  if (size < count) {
    memory.reset(new T[count]);
    size = count;
  }
  return memory.get();
}

template <class T>
class Multiply {
 public:
  explicit Multiply(const Product<T>& product) : p_(product) {}

  // Cut along the longer side of c, into one part for each thread.
  void run() const {
    const int64_t work = p_.rows * p_.columns * p_.depth;
    if (work == 0) {
      std::fill_n(p_.c, p_.rows * p_.columns, T(0));
      return;
    }
    if (work < 65536) return part(0, p_.rows, 0, p_.columns);
    const bool by_rows = p_.rows >= p_.columns;
    const int64_t unit = by_rows ? loops_.highest : loops_.lanes;
    const int64_t units = ceil_div(by_rows ? p_.rows : p_.columns, unit);
    const int64_t parts = std::min<int64_t>(units, torch::stable::get_num_threads());
    torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      const int64_t from = units * begin / parts * unit, to = units * end / parts * unit;
      if (by_rows)
        part(from, std::min(to, p_.rows), 0, p_.columns);
      else
        part(0, p_.rows, from, std::min(to, p_.columns));
    });
  }

 private:
  void part(int64_t row0, int64_t row1, int64_t column0, int64_t column1) const {
    const int64_t width = 2 * loops_.lanes;
    const int64_t depth = std::min(depth_at_once, p_.depth);
    const int64_t columns = ceil_div(std::min(columns_at_once, column1 - column0), width) * width;
    const int64_t of_b = columns * depth, of_a = loops_.highest * depth;
    T* const b = scratch<T>(of_b + of_a + loops_.highest * width);
    T *const a = b + of_b, *const rest = a + of_a;
    // What the first cache holds is read where it lies: packing would cost as much as the product.
    const bool small = p_.depth * p_.columns * int64_t(sizeof(T)) <= small_matrix;
    const bool in_place = small && p_.columns % width == 0;
    for (int64_t c0 = column0; c0 < column1; c0 += columns_at_once) {
      const int64_t c1 = std::min(c0 + columns_at_once, column1);
      for (int64_t k = 0; k < p_.depth; k += depth_at_once) {
        const int64_t n = std::min(depth_at_once, p_.depth - k);
        const T* of_columns = p_.b + k * p_.columns + c0;
        if (!in_place) loops_.pack_columns(of_columns, p_.columns, n, c1 - c0, b);
        const Panels right =
            in_place ? Panels{of_columns, width, p_.columns} : Panels{b, width * n, width};
        const int64_t panels = ceil_div(row1 - row0, loops_.highest);
        for (int64_t i = 0; i < panels; ++i) {  // of nearly the same height
          const int64_t r0 = row0 + (row1 - row0) * i / panels;
          const int64_t height = row0 + (row1 - row0) * (i + 1) / panels - r0;
          const T* of_rows = p_.a + r0 * p_.a_row + k * p_.a_column;
          const bool as_is = small && p_.a_row == 1;
          if (!as_is) loops_.pack_rows(of_rows, p_.a_row, p_.a_column, n, height, a);
          const Panels left = as_is ? Panels{of_rows, 0, p_.a_column} : Panels{a, 0, height};
          panel(left, right, n, k > 0, p_.c + r0 * p_.columns + c0, height, c1 - c0, rest);
        }
      }
    }
  }

  // Panels `next` apart, each with a line every `step` elements.
  struct Panels {
    const T* data;
    int64_t next, step;
  };

  // A panel of a times all panels of b. Columns that fill no vector are worked out apart.
  void panel(const Panels& a, const Panels& b, int64_t depth, bool add, T* c, int64_t height,
             int64_t columns, T* rest) const {
    const int64_t lanes = loops_.lanes, width = 2 * lanes;
    const T* from = b.data;
    for (int64_t j = 0; j < columns; j += width, from += b.next) {
      const int64_t n = std::min(width, columns - j);
      const auto loop = loops_.tile[n > lanes][height - 1];
      if (n == width || n == lanes) {
        loop(a.data, a.step, from, b.step, depth, add, c + j, p_.columns);
        continue;
      }
      loop(a.data, a.step, from, b.step, depth, false, rest, width);
      for (int64_t i = 0; i < height; ++i)
        for (int64_t l = 0; l < n; ++l) {
          T& to = c[i * p_.columns + j + l];
          to = add ? to + rest[i * width + l] : rest[i * width + l];
        }
    }
  }

  const Product<T> p_;
  const TileLoops<T> loops_ = TORCHBP_PICK(matrix_loops<T>());
};

// Short sums in the element's type, joined in float64.
template <class T>
static void sum_rows(const T* g, int64_t rows, int64_t columns, T* to) {
  std::vector<double> total(columns);
  std::vector<T> sum(columns);
  for (int64_t r0 = 0; r0 < rows; r0 += 64) {
    std::fill(sum.begin(), sum.end(), T(0));
    for (int64_t r = r0; r < std::min(rows, r0 + 64); ++r)
      for (int64_t j = 0; j < columns; ++j) sum[j] += g[r * columns + j];
    for (int64_t j = 0; j < columns; ++j) total[j] += double(sum[j]);
  }
  for (int64_t j = 0; j < columns; ++j) to[j] = T(total[j]);
}

static void check_linear(const Tensor& g, const Tensor& x, const Tensor& weight) {
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double,
                  "x: expected float32 or float64, got ", torch::headeronly::toString(dtype));
  check_alike(g, "grad_output", x, "x");
  check_alike(weight, "weight", x, "x");
  STD_TORCH_CHECK(x.dim() == 2, "x: expected 2 dims, got ", x.dim());
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(1) == x.size(1), "weight: expected ", x.size(1),
                  " columns, as x has");
  STD_TORCH_CHECK(g.dim() == 2 && g.size(0) == x.size(0) && g.size(1) == weight.size(0),
                  "grad_output: expected ", x.size(0), " x ", weight.size(0));
}

static std::tuple<Tensor, Tensor, Tensor> linear_backward_cpu(const Tensor& g_, const Tensor& x_,
                                                              const Tensor& weight_, bool of_x,
                                                              bool of_weight, bool of_bias) {
  check_linear(g_, x_, weight_);
  const int64_t rows = x_.size(0), inputs = x_.size(1), outputs = weight_.size(0);
  const Tensor g = packed(g_);
  const Tensor grad_x = fresh(g, {of_x ? rows : 0, inputs});
  const Tensor grad_weight = fresh(g, {of_weight ? outputs : 0, inputs});
  const Tensor grad_bias = fresh(g, {of_bias ? outputs : 0});
  const auto run = [&](auto scalar) {
    using T = decltype(scalar);
    if (of_x) {
      const Tensor weight = packed(weight_);
      Multiply<T>(
          {input<T>(g), input<T>(weight), output<T>(grad_x), rows, inputs, outputs, outputs, 1})
          .run();
    }
    if (of_weight) {
      const Tensor x = packed(x_);
      Multiply<T>(
          {input<T>(g), input<T>(x), output<T>(grad_weight), outputs, inputs, rows, 1, outputs})
          .run();
    }
    if (of_bias) sum_rows<T>(input<T>(g), rows, outputs, output<T>(grad_bias));
  };
  x_.scalar_type() == ScalarType::Double ? run(double{}) : run(float{});
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace torchbp

STABLE_TORCH_LIBRARY_FRAGMENT(torchbp, m) {
  m.def(
      "linear_backward(Tensor grad_output, Tensor x, Tensor weight, bool of_x, bool of_weight,"
      " bool of_bias) -> (Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(torchbp, CPU, m) {
  m.impl("linear_backward", TORCH_BOX(&torchbp::linear_backward_cpu));
}
