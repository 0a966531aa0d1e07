#include <limits>
#include <vector>

#include "cpu/isa.h"
#include "torchbp/max_pool.h"
#include "torchbp/tensor.h"

namespace torchbp {

using Sizes = std::vector<int64_t>;

template <class T, class O>
struct ChannelLoops {
  void (*choose)(const T*, const int64_t*, const int64_t*, int64_t, int64_t, int64_t, T*, O*);
  void (*gather)(const T*, const O*, const int64_t*, const int64_t*, const int64_t*, int64_t,
                 int64_t, T*);
};

}  // namespace torchbp

#define TORCHBP_LOOPS "cpu/max_pool_channels_loops.inc"
#include "cpu/each_isa.inc"

namespace torchbp {

// f(n, d, h, w) for every place of every sample, some at once.
template <class F>
static void each_place(const Pool& q, const int64_t* size, const F& f) {
  const int64_t rows = q.samples * size[0] * size[1];
  const int64_t elements = size[2] * q.channels * std::min<int64_t>(q.taps(), 9);
  const int64_t grain = std::max<int64_t>(1, (1 << 16) / std::max<int64_t>(1, elements));
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    auto own = f();
    for (int64_t r = begin; r < end; ++r)
      for (int64_t w = 0; w < size[2]; ++w)
        own(r / size[1] / size[0], r / size[1] % size[0], r % size[1], w);
  });
}

// The taps of one window along one dimension that are not padding, and the elements they are.
struct Reached {
  int64_t count = 0;
  std::vector<int64_t> taps, elements;

  explicit Reached(int64_t most) : taps(most), elements(most) {}
  void add(int64_t tap, int64_t element) {
    taps[count] = tap;
    elements[count++] = element;
  }
  void of_window(const Pool& q, int d, int64_t o) {
    count = 0;
    for (int64_t t = q.first_tap(d, o); t < q.kernel[d]; ++t) {
      const int64_t at = q.begin(d, o) + t * q.dilation[d];
      if (at < q.in[d]) add(t, at);
    }
  }
  // The windows that reach an element, in order, and which tap of theirs it is.
  void of_element(const Pool& q, int d, int64_t i) {
    count = 0;
    for (int64_t t = q.kernel[d] - 1; t >= 0; --t) {
      const int64_t at = i + q.padding[d] - t * q.dilation[d];
      if (at >= 0 && at % q.stride[d] == 0 && at / q.stride[d] < q.out[d]) add(t, at / q.stride[d]);
    }
  }
};

// Of every place of every dimension what it reaches, worked out once.
struct Reach {
  std::vector<Reached> places[3];

  Reach(const Pool& q, const int64_t* size, void (Reached::*of)(const Pool&, int, int64_t)) {
    for (int d = 0; d < 3; ++d)
      for (int64_t i = 0; i < size[d]; ++i) {
        places[d].emplace_back(q.kernel[d]);
        (places[d].back().*of)(q, d, i);
      }
  }
  // f(tap number, three elements) for every combination of one tap per dimension.
  template <class F>
  void each_tap(const Pool& q, int64_t d, int64_t h, int64_t w, const F& f) const {
    const Reached &a = places[0][d], &b = places[1][h], &c = places[2][w];
    for (int64_t i = 0; i < a.count; ++i)
      for (int64_t j = 0; j < b.count; ++j)
        for (int64_t k = 0; k < c.count; ++k)
          f((a.taps[i] * q.kernel[1] + b.taps[j]) * q.kernel[2] + c.taps[k], a.elements[i],
            b.elements[j], c.elements[k]);
  }
};

template <class T, class O>
void channels_forward(const Pool& q, const T* x, const Steps& from, T* y, O* offsets,
                      const Steps& to) {
  const auto loops = TORCHBP_PICK(channel_loops<T, O>());
  const Reach reach(q, q.out, &Reached::of_window);
  each_place(q, q.out, [&] {
    return [&, places = Sizes(q.taps()), taps = Sizes(q.taps())](int64_t n, int64_t d, int64_t h,
                                                                 int64_t w) mutable {
      int64_t count = 0;
      reach.each_tap(q, d, h, w, [&](int64_t tap, int64_t a, int64_t b, int64_t c) {
        taps[count] = tap;
        places[count++] = from.at(n, a, b, c);
      });
      const int64_t at = to.at(n, d, h, w);
      loops.choose(x, places.data(), taps.data(), count, q.first_tap(d, h, w), q.channels, y + at,
                   offsets + at);
    };
  });
}

template <class T, class O>
void channels_backward(const Pool& q, const T* g, const Steps& from, const O* offsets,
                       const Steps& from_offsets, T* grad, const Steps& to) {
  const auto loops = TORCHBP_PICK(channel_loops<T, O>());
  const Reach reach(q, q.in, &Reached::of_element);
  each_place(q, q.in, [&] {
    return [&, places = Sizes(q.taps()), places_o = Sizes(q.taps()), taps = Sizes(q.taps())](
               int64_t n, int64_t d, int64_t h, int64_t w) mutable {
      int64_t count = 0;
      reach.each_tap(q, d, h, w, [&](int64_t tap, int64_t a, int64_t b, int64_t c) {
        taps[count] = tap;
        places_o[count] = from_offsets.at(n, a, b, c);
        places[count++] = from.at(n, a, b, c);
      });
      loops.gather(g, offsets, places.data(), places_o.data(), taps.data(), count, q.channels,
                   grad + to.at(n, d, h, w));
    };
  });
}

#define TORCHBP_POOL(T, O)                                                                         \
  template void channels_forward(const Pool&, const T*, const Steps&, T*, O*, const Steps&);       \
  template void channels_backward(const Pool&, const T*, const Steps&, const O*, const Steps&, T*, \
                                  const Steps&);
#define TORCHBP_POOLS(T) TORCHBP_POOL(T, uint8_t) TORCHBP_POOL(T, int32_t)
TORCHBP_POOLS(float)
TORCHBP_POOLS(double)
TORCHBP_POOLS(bf16)
TORCHBP_POOLS(f16)

}  // namespace torchbp
