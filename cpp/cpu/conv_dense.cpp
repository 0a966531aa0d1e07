#include <memory>
#include <utility>
#include <vector>

#include "cpu/isa.h"
#include "torchbp/conv.h"
#include "torchbp/tensor.h"

namespace torchbp {

template <class T>
using MultiplyLoop = void (*)(const T*, const T*, const int64_t*, int64_t, int64_t, int64_t, bool,
                              T*);
template <class T>
struct DenseLoops {
  void (*pack)(const T*, const Planes<T>&, const Window&, int64_t, int64_t, T*);
  const MultiplyLoop<T>* multiply[2];  // by the vectors of a column block, then by its height
  int64_t highest, lanes;
};

}  // namespace torchbp

#define TORCHBP_LOOPS "cpu/conv_dense_loops.inc"
#include "cpu/each_isa.inc"

namespace torchbp {

// For each tap a product of matrices, outputs x positions times positions x channels. Some samples
// at a time, both are packed into panels, g into blocks of outputs and x into blocks of channels
// with their border of zeros; every tap then reads the same panel of x from another place on, and
// a tile of sums stays in registers. Where x has fewer channels than a vector has lanes, its panel
// has no gaps, so that the taps along the width, which lie side by side, are lanes, too.
template <class T>
class Dense {
 public:
  Dense(const Conv& conv, const Planes<T>& g, const Planes<T>& x) : conv_(conv), g_(g), x_(x) {
    merged_ = conv.inputs < loops_.lanes && conv.kernel[2] > 1 && conv.dilation[2] == 1;
    for (int d = 0; d < 3; ++d) {
      const bool one = conv.kernel[d] == 1;  // what a stride leaves out is not packed
      taps_[d] = merged_ && d == 2 ? 1 : conv.kernel[d];
      steps_[d] = one ? 1 : conv.stride[d];
      places_x_.step[d] = one ? conv.stride[d] : 1;
      places_x_.padding[d] = conv.padding[d];
      places_x_.size[d] =
          (conv.out[d] - 1) * steps_[d] + (conv.kernel[d] - 1) * conv.dilation[d] + 1;
      places_g_.size[d] = conv.out[d];
    }
    lanes_ = conv.inputs * (merged_ ? conv.kernel[2] : 1);
    width_ = 2 * loops_.lanes;
    blocks_ = ceil_div(lanes_, width_);
    rows_ = ceil_div(conv.outputs, loops_.highest);
    height_ = ceil_div(conv.outputs, rows_);
    tiles_ = conv.groups * rows_ * blocks_;
    n_taps_ = taps_[0] * taps_[1] * taps_[2];
    size_g_ = places_g_.places() * height_ * rows_ * conv.groups;
    size_x_ = places_x_.places() * (merged_ ? conv.inputs : pitch_of_all()) * conv.groups;
  }

  void run(T* grad_weight) {
    const int64_t at_once =
        std::clamp<int64_t>((int64_t(1) << 19) / (size_g_ + size_x_), 1, conv_.samples);
    // The vectors of the last places reach beyond a panel without gaps.
    const int64_t room = ceil_div(at_once * size_x_ + width_, line) * line;
    const std::unique_ptr<T[]> memory(new T[room + at_once * size_g_ + line]);
    const auto address = reinterpret_cast<uintptr_t>(memory.get());
    panels_x_ = memory.get() + (64 - address % 64) % 64 / sizeof(T);
    panels_g_ = panels_x_ + room;
    if (merged_) std::fill_n(panels_x_ + at_once * size_x_, width_, T(0));
    const int64_t slot = n_taps_ * height_ * width_;
    std::vector<T> sums(at_once < conv_.samples ? tiles_ * slot : 0);
    for (int64_t n = 0; n < conv_.samples; n += at_once) {
      first_ = n;
      count_ = std::min(at_once, conv_.samples - n);
      pack();
      const std::vector<int64_t> starts = row_starts();
      const bool last = n + count_ == conv_.samples;
      torch::stable::parallel_for(0, tiles_ * n_taps_, 1, [&](int64_t begin, int64_t end) {
        std::vector<T> own(sums.empty() ? slot : 0);
        for (int64_t i = begin; i < end;) {
          const int64_t tile = i / n_taps_, tap0 = i % n_taps_;
          const int64_t tap1 = std::min(n_taps_, tap0 + end - i);
          T* to = sums.empty() ? own.data() : sums.data() + tile * slot;
          multiply(tile, tap0, tap1, starts, n > 0, to);
          if (last) unpack(tile, tap0, tap1, to, grad_weight);
          i += tap1 - tap0;
        }
      });
    }
  }

 private:
  static constexpr int64_t line = 64 / sizeof(T);  // elements of a line of the cache

  int64_t pitch(int64_t block) const {
    if (merged_) return conv_.inputs;
    return vectors(block) * loops_.lanes;
  }
  int64_t vectors(int64_t block) const { return lanes_ - block * width_ <= loops_.lanes ? 1 : 2; }
  int64_t pitch_of_all() const {
    return (blocks_ - 1) * width_ + vectors(blocks_ - 1) * loops_.lanes;
  }
  T* panel_g(int64_t group, int64_t row) const {
    return panels_g_ + (group * rows_ + row) * count_ * places_g_.places() * height_;
  }
  // Of a panel without gaps, every block reads the same.
  T* panel_x(int64_t group, int64_t block) const {
    return panels_x_ + group * count_ * (size_x_ / conv_.groups) +
           (merged_ ? block * width_ : count_ * places_x_.places() * block * width_);
  }

  void pack() const {
    const int64_t blocks = merged_ ? 1 : blocks_, panels = blocks + rows_;
    const int64_t all = conv_.groups * panels * count_;
    const int64_t grain = ceil_div(16384 * all, count_ * (size_g_ + size_x_));
    torch::stable::parallel_for(0, all, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t n = i % count_, k = i / count_ / panels, b = i / count_ % panels;
        if (b < blocks) {
          const int64_t c = b * width_, p = pitch(b);
          loops_.pack(x_.data + (first_ + n) * x_.sample + (k * conv_.inputs + c) * x_.channel, x_,
                      places_x_, std::min(p, conv_.inputs - c), p,
                      panel_x(k, b) + n * places_x_.places() * p);
        } else {
          const int64_t o = (b - blocks) * height_;
          loops_.pack(g_.data + (first_ + n) * g_.sample + (k * conv_.outputs + o) * g_.channel, g_,
                      places_g_, std::min(height_, conv_.outputs - o), height_,
                      panel_g(k, b - blocks) + n * places_g_.places() * height_);
        }
      }
    });
  }

  // Where the first tap begins each row of positions, in places of x.
  std::vector<int64_t> row_starts() const {
    std::vector<int64_t> starts;
    for (int64_t n = 0; n < count_; ++n)
      for (int64_t d = 0; d < conv_.out[0]; ++d)
        for (int64_t h = 0; h < conv_.out[1]; ++h)
          starts.push_back(
              ((n * places_x_.size[0] + d * steps_[0]) * places_x_.size[1] + h * steps_[1]) *
              places_x_.size[2]);
    return starts;
  }

  void multiply(int64_t tile, int64_t tap0, int64_t tap1, const std::vector<int64_t>& rows,
                bool add, T* sums) const {
    const int64_t b = tile % blocks_, o = tile / blocks_ % rows_, k = tile / blocks_ / rows_;
    const int64_t p = pitch(b), columns = conv_.out[2], n_rows = int64_t(rows.size());
    const auto loop = loops_.multiply[vectors(b) - 1][height_ - 1];
    const T *g = panel_g(k, o), *x = panel_x(k, b);
    std::vector<int64_t> starts(rows);
    for (int64_t& start : starts) start *= p;
    // As many rows at once as stay in the second-level cache for all taps.
    const int64_t chunk = std::max<int64_t>(1, (1 << 16) / (columns * (height_ + p * steps_[2])));
    for (int64_t r = 0; r < n_rows; r += chunk)
      for (int64_t t = tap0; t < tap1; ++t) {
        const int64_t i = t / taps_[2] / taps_[1], j = t / taps_[2] % taps_[1], l = t % taps_[2];
        const int64_t offset =
            ((i * conv_.dilation[0] * places_x_.size[1] + j * conv_.dilation[1]) *
                 places_x_.size[2] +
             l * conv_.dilation[2]) *
            p;
        loop(g + r * columns * height_, x + offset, starts.data() + r, std::min(chunk, n_rows - r),
             columns, steps_[2] * p, add || r > 0, sums + t * height_ * width_);
      }
  }

  void unpack(int64_t tile, int64_t tap0, int64_t tap1, const T* sums, T* grad_weight) const {
    const int64_t b = tile % blocks_, o0 = tile / blocks_ % rows_ * height_;
    const int64_t k = tile / blocks_ / rows_, c0 = b * width_, pitch = vectors(b) * loops_.lanes;
    const int64_t taps = conv_.taps(), lanes = std::min(pitch, lanes_ - c0);
    for (int64_t o = 0; o < std::min(height_, conv_.outputs - o0); ++o) {
      T* to = grad_weight + (k * conv_.outputs + o0 + o) * conv_.inputs * taps;
      for (int64_t t = tap0; t < tap1; ++t) {
        const T* from = sums + t * height_ * width_ + o * pitch;
        if (!merged_)
          for (int64_t j = 0; j < lanes; ++j) to[(c0 + j) * taps + t] = from[j];
        else
          for (int64_t j = 0; j < lanes; ++j) {
            const int64_t c = (c0 + j) % conv_.inputs, l = (c0 + j) / conv_.inputs;
            to[c * taps + t * conv_.kernel[2] + l] = from[j];
          }
      }
    }
  }

  Conv conv_;
  Planes<T> g_, x_;
  DenseLoops<T> loops_ = TORCHBP_PICK(dense_loops<T>());
  Window places_g_{{1, 1, 1}, {1, 1, 1}, {0, 0, 0}}, places_x_{{1, 1, 1}, {1, 1, 1}, {0, 0, 0}};
  bool merged_;                          // the taps along the width are lanes
  int64_t taps_[3], n_taps_, steps_[3];  // all other taps; places of x from position to position
  int64_t lanes_, width_, blocks_;       // columns of the products, cut into blocks
  int64_t height_, rows_, tiles_;        // lanes of a block of outputs, and how many blocks
  int64_t size_g_, size_x_;              // elements of the panels of one sample
  int64_t first_ = 0, count_ = 0;        // samples that are packed
  T *panels_g_ = nullptr, *panels_x_ = nullptr;
};

template <class T>
void dense_grad_weight(const Conv& conv, const Planes<T>& g, const Planes<T>& x, T* grad_weight) {
  Dense<T>(conv, g, x).run(grad_weight);
}
template void dense_grad_weight(const Conv&, const Planes<float>&, const Planes<float>&, float*);
template void dense_grad_weight(const Conv&, const Planes<double>&, const Planes<double>&, double*);

}  // namespace torchbp
