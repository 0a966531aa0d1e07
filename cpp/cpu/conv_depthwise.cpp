#include <array>
#include <utility>
#include <vector>

#include "cpu/isa.h"
#include "torchbp/conv.h"
#include "torchbp/tensor.h"

namespace torchbp {

template <class T>
using CorrelateLoop = void (*)(const T*, const T*, const int64_t*, int64_t, T*);
template <class T>
struct DepthwiseLoops {
  void (*copy)(const T*, const Planes<T>&, const Window&, const int64_t*, T*);
  T (*sum_lanes)(const T*);
  const CorrelateLoop<T>* correlate;  // by the number of taps
  int64_t most, lanes;                // taps that fit into the registers
};

}  // namespace torchbp

#define TORCHBP_LOOPS "cpu/conv_depthwise_loops.inc"
#include "cpu/each_isa.inc"

namespace torchbp {

// One channel meets one output: each tap's gradient is the product of two lines, g and x from the
// tap's place on. Both are copied with their borders of zeros into rows of one length, so that all
// rows make one long line. A stride is taken apart first: the elements of one remainder make a
// line of their own.
template <class T>
class Depthwise {
 public:
  Depthwise(const Conv& conv, const Planes<T>& g, const Planes<T>& x) : conv_(conv), g_(g), x_(x) {
    int64_t span[3];
    for (int d = 0; d < 3; ++d) {
      const int64_t reach = (conv.kernel[d] - 1) * conv.dilation[d];
      lengths_[d] = conv.out[d] + reach / conv.stride[d];
      phases_[d] = std::min(conv.stride[d], reach + 1);
      span[d] = conv.out[d] - 1;
      places_g_.size[d] = conv.out[d];
    }
    const int64_t used = (span[0] * lengths_[1] + span[1]) * lengths_[2] + span[2] + 1;
    vectors_ = ceil_div(used, loops_.lanes);
    // The last vectors of the farthest tap end beyond the line.
    line_ = ceil_div(lengths_[0] * lengths_[1] * lengths_[2] + loops_.lanes, 16) * 16;
    const auto offset = [&](int64_t i, int64_t j, int64_t k) {
      const int64_t at[3] = {i * conv.dilation[0], j * conv.dilation[1], k * conv.dilation[2]};
      int64_t phase = 0, place = 0;
      for (int d = 0; d < 3; ++d) {
        phase = phase * phases_[d] + at[d] % conv.stride[d];
        place = place * lengths_[d] + at[d] / conv.stride[d];
      }
      return phase * line_ + place;
    };
    for (int64_t i = 0; i < conv.kernel[0]; ++i)
      for (int64_t j = 0; j < conv.kernel[1]; ++j)
        for (int64_t k = 0; k < conv.kernel[2]; ++k) offsets_.push_back(offset(i, j, k));
  }

  void run(T* grad_weight) const {
    const int64_t outputs = conv_.groups * conv_.outputs;
    torch::stable::parallel_for(0, outputs, 1, [&](int64_t begin, int64_t end) {
      const int64_t phases = phases_[0] * phases_[1] * phases_[2];
      std::vector<T> lines((phases + 1) * line_), sums(conv_.taps() * loops_.lanes);
      for (int64_t o = begin; o < end; ++o) {
        std::fill(sums.begin(), sums.end(), T(0));
        for (int64_t n = 0; n < conv_.samples; ++n) add(n, o, lines.data(), sums.data());
        for (int64_t t = 0; t < conv_.taps(); ++t)
          grad_weight[o * conv_.taps() + t] = loops_.sum_lanes(sums.data() + t * loops_.lanes);
      }
    });
  }

 private:
  void add(int64_t n, int64_t o, T* lines, T* sums) const {
    const T* x = x_.data + n * x_.sample + o / conv_.outputs * x_.channel;
    T *line_g = lines, *line_x = lines + line_;
    loops_.copy(g_.data + n * g_.sample + o * g_.channel, g_, places_g_, lengths_, line_g);
    for (int64_t i = 0, p = 0; i < phases_[0]; ++i)
      for (int64_t j = 0; j < phases_[1]; ++j)
        for (int64_t k = 0; k < phases_[2]; ++k, ++p)
          loops_.copy(x, x_, places_x({i, j, k}), lengths_, line_x + p * line_);
    const int64_t taps = conv_.taps(), calls = ceil_div(taps, loops_.most);
    const int64_t at_once = ceil_div(taps, calls);
    for (int64_t t = 0; t < taps; t += at_once) {
      const int64_t count = std::min(at_once, taps - t);
      loops_.correlate[count - 1](line_g, line_x, offsets_.data() + t, vectors_,
                                  sums + t * loops_.lanes);
    }
  }
  Window places_x(std::array<int64_t, 3> phase) const {
    Window w;
    for (int d = 0; d < 3; ++d) {
      w.size[d] = lengths_[d];
      w.step[d] = conv_.stride[d];
      w.padding[d] = conv_.padding[d] - phase[d];
    }
    return w;
  }

  Conv conv_;
  Planes<T> g_, x_;
  DepthwiseLoops<T> loops_ = TORCHBP_PICK(depthwise_loops<T>());
  Window places_g_{{1, 1, 1}, {1, 1, 1}, {0, 0, 0}};
  int64_t lengths_[3], phases_[3];
  int64_t line_, vectors_;        // elements of a line; vectors that g fills
  std::vector<int64_t> offsets_;  // where each tap begins in the lines of x
};

template <class T>
void depthwise_grad_weight(const Conv& conv, const Planes<T>& g, const Planes<T>& x,
                           T* grad_weight) {
  Depthwise<T>(conv, g, x).run(grad_weight);
}
template void depthwise_grad_weight(const Conv&, const Planes<float>&, const Planes<float>&,
                                    float*);
template void depthwise_grad_weight(const Conv&, const Planes<double>&, const Planes<double>&,
                                    double*);

}  // namespace torchbp
