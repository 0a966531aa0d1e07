#include <limits>
#include <type_traits>
#include <vector>

#include "cpu/isa.h"
#include "torchbp/max_pool.h"
#include "torchbp/tensor.h"

namespace torchbp {

template <class T, class O, class A = acc_t<T>, class W = tap_t<A>>
struct PoolLoops {
  void (*split)(const T*, int64_t, int64_t, int64_t, int64_t, int64_t, A, A*, int64_t);
  void (*split_taps)(const O*, int64_t, int64_t, int64_t, int64_t, int64_t, W, W*, int64_t);
  void (*merge)(const A*, int64_t, int64_t, int64_t, int64_t, T*, int64_t);
  void (*choose)(const A*, const int64_t*, int64_t, int64_t, A*, W*);
  void (*gather)(const A*, const W*, const int64_t*, const int64_t*, int64_t, int64_t, A*);
  bool (*store)(const A*, const W*, int64_t, T*, O*);
  int64_t lanes;
};

}  // namespace torchbp

#define TORCHBP_LOOPS "cpu/max_pool_planes_loops.inc"
#include "cpu/each_isa.inc"

namespace torchbp {

static constexpr int64_t block_elements = 1 << 14, grain_elements = 1 << 15;

// Planes that lie one behind another are pooled as one of that depth, where the depth is left
// alone. A stride past the end, which leaves one window, is cut: each remainder by it costs a line.
static Pool joined(Pool q) {
  for (int d = 0; d < 3; ++d)
    q.stride[d] = std::clamp<int64_t>(q.in[d] + q.padding[d], 1, q.stride[d]);
  if (q.kernel[0] == 1 && q.stride[0] == 1 && q.padding[0] == 0) {
    q.in[0] = q.out[0] = q.samples * q.channels * q.in[0];
    q.samples = q.channels = 1;
  }
  return q;
}

// A grid of places cut into blocks. The elements of a block stand in lines: those of one remainder
// by the stride make a line of their own, which holds all rows of the block, each with `margin`
// places more than the block is wide. Then a tap of every window is one line from some place on,
// and the rows make one long loop.
struct Blocks {
  int64_t size[3], margin[3], phases[3], block[3], length[3], count[3];

  Blocks(const int64_t* places, const Pool& q, const int64_t* phases_) {
    for (int d = 0; d < 3; ++d) {
      size[d] = block[d] = places[d];
      margin[d] = q.reach(d) / q.stride[d];
      phases[d] = phases_[d];
    }
    // Halved until a block fits the cache: the depth first, the width last.
    for (int d = 0; d < 3; ++d) {
      while (block[d] > 1 && elements() > block_elements) block[d] = ceil_div(block[d], 2);
      count[d] = ceil_div(size[d], block[d]);
    }
    for (int d = 0; d < 3; ++d) length[d] = block[d] + margin[d];
  }
  int64_t elements() const {
    int64_t n = 1;
    for (int d = 0; d < 3; ++d) n *= phases[d] * (block[d] + margin[d]);
    return n;
  }
  int64_t all() const { return count[0] * count[1] * count[2]; }
  int64_t line() const { return length[0] * length[1] * length[2]; }
  int64_t begin(int d, int64_t i) const {
    const int64_t inner = d == 0 ? count[1] * count[2] : d == 1 ? count[2] : 1;
    return i / inner % count[d] * block[d];
  }
  int64_t extent(int d, int64_t i) const { return std::min(block[d], size[d] - begin(d, i)); }
  // From the first place of a block to behind the last one, in a line.
  int64_t used() const {
    return ((block[0] - 1) * length[1] + block[1] - 1) * length[2] + block[2];
  }
};

// f(block) for every block of every plane, some at once.
template <class F>
static void each_block(int64_t planes, const Blocks& b, const F& f) {
  const int64_t grain = std::max<int64_t>(1, grain_elements / std::max<int64_t>(1, b.elements()));
  torch::stable::parallel_for(0, planes * b.all(), grain, f);
}

// Planes whose rows are contiguous. The elements of a block are split into lines, padded with
// -infinity, which beats nothing.
template <class T, class O>
class PlanesForward {
  using A = acc_t<T>;
  using W = tap_t<A>;

 public:
  explicit PlanesForward(const Pool& pool) : q_(joined(pool)) {
    for (int d = 0; d < 3; ++d) phases_[d] = std::min(q_.stride[d], q_.reach(d) + 1);
  }

  void run(const T* x, T* y, O* offsets) const {
    const Blocks b(q_.out, q_, phases_);
    const int64_t vectors = ceil_div(b.used(), loops_.lanes), room = vectors * loops_.lanes;
    const int64_t line = b.line() + loops_.lanes;  // the last vectors end beyond it
    const std::vector<int64_t> starts = tap_starts(b, line);
    each_block(q_.samples * q_.channels, b, [&](int64_t begin, int64_t end) {
      std::vector<A> lines(phases_[0] * phases_[1] * phases_[2] * line), best(room);
      std::vector<W> which(room);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t plane = i / b.all(), block = i % b.all();
        const int64_t in = q_.in[0] * q_.in[1] * q_.in[2];
        fill(x + plane * in, b, block, line, lines.data());
        loops_.choose(lines.data(), starts.data(), q_.taps(), vectors, best.data(), which.data());
        const int64_t out = plane * q_.out[0] * q_.out[1] * q_.out[2];
        write(b, block, best.data(), which.data(), y + out, offsets + out);
      }
    });
  }

 private:
  std::vector<int64_t> tap_starts(const Blocks& b, int64_t line) const {
    std::vector<int64_t> starts;
    for (int64_t i = 0; i < q_.kernel[0]; ++i)
      for (int64_t j = 0; j < q_.kernel[1]; ++j)
        for (int64_t k = 0; k < q_.kernel[2]; ++k) {
          const int64_t tap[3] = {i, j, k};
          int64_t phase = 0, place = 0;
          for (int d = 0; d < 3; ++d) {
            const int64_t at = tap[d] * q_.dilation[d];
            phase = phase * phases_[d] + at % q_.stride[d];
            place = place * b.length[d] + at / q_.stride[d];
          }
          starts.push_back(phase * line + place);
        }
    return starts;
  }

  void fill(const T* x, const Blocks& b, int64_t block, int64_t line, A* lines) const {
    constexpr A lowest = -std::numeric_limits<A>::infinity();
    const int64_t first = q_.begin(2, b.begin(2, block)), phases = phases_[1] * phases_[2];
    const int64_t rows[2] = {b.extent(0, block) + b.margin[0], b.extent(1, block) + b.margin[1]};
    const int64_t width = b.extent(2, block) + b.margin[2];
    for (int64_t r = 0; r < phases_[0] * phases_[1]; ++r)
      for (int64_t d = 0; d < rows[0]; ++d)
        for (int64_t h = 0; h < rows[1]; ++h) {
          const int64_t z = q_.begin(0, b.begin(0, block) + d) + r / phases_[1];
          const int64_t v = q_.begin(1, b.begin(1, block) + h) + r % phases_[1];
          const bool inside = z >= 0 && z < q_.in[0] && v >= 0 && v < q_.in[1];
          const T* row = x + (z * q_.in[1] + v) * q_.in[2];
          A* to = lines + (r / phases_[1] * phases + r % phases_[1] * phases_[2]) * line +
                  (d * b.length[1] + h) * b.length[2];
          loops_.split(inside ? row : x, inside ? q_.in[2] : 0, first, q_.stride[2], phases_[2],
                       width, lowest, to, line);
        }
  }

  void write(const Blocks& b, int64_t block, const A* best, const W* which, T* y,
             O* offsets) const {
    const int64_t column = b.begin(2, block), width = b.extent(2, block);
    for (int64_t d = 0; d < b.extent(0, block); ++d)
      for (int64_t h = 0; h < b.extent(1, block); ++h) {
        const int64_t z = b.begin(0, block) + d, v = b.begin(1, block) + h;
        const int64_t from = (d * b.length[1] + h) * b.length[2];
        const int64_t to = (z * q_.out[1] + v) * q_.out[2] + column;
        if (!loops_.store(best + from, which + from, width, y + to, offsets + to)) continue;
        for (int64_t w = 0; w < width; ++w)
          if (best[from + w] == -std::numeric_limits<A>::infinity())  // which nothing beats
            offsets[to + w] = O(q_.first_tap(z, v, column + w));
      }
  }

  Pool q_;
  PoolLoops<T, O> loops_ = TORCHBP_PICK(pool_loops<T, O>());
  int64_t phases_[3];
};

// The reverse: the errors and tap numbers of the windows that reach into a block stand in a line,
// and each remainder of elements by the stride gathers from it what its taps received.
template <class T, class O>
class PlanesBackward {
  using A = acc_t<T>;
  using W = tap_t<A>;

 public:
  explicit PlanesBackward(const Pool& pool) : q_(joined(pool)) {
    for (int d = 0; d < 3; ++d) places_[d] = ceil_div(q_.in[d] + q_.padding[d], q_.stride[d]);
  }

  void run(const T* g, const O* offsets, T* grad) const {
    const int64_t one[3] = {1, 1, 1};
    const Blocks b(places_, q_, one);
    const int64_t vectors = ceil_div(b.used(), loops_.lanes), room = vectors * loops_.lanes;
    const int64_t line = b.line() + loops_.lanes;
    const std::vector<Phase> phases = all_phases(b);
    each_block(q_.samples * q_.channels, b, [&](int64_t begin, int64_t end) {
      std::vector<A> errors(line), sums(q_.stride[2] * room);
      std::vector<W> which(line);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t plane = i / b.all(), block = i % b.all();
        const int64_t out = plane * q_.out[0] * q_.out[1] * q_.out[2];
        fill(g + out, offsets + out, b, block, errors.data(), which.data());
        T* to = grad + plane * q_.in[0] * q_.in[1] * q_.in[2];
        for (int64_t r = 0; r < q_.stride[0] * q_.stride[1]; ++r) {
          for (int64_t k = 0; k < q_.stride[2]; ++k) {
            const Phase& p = phases[r * q_.stride[2] + k];
            loops_.gather(errors.data(), which.data(), p.starts.data(), p.taps.data(),
                          int64_t(p.taps.size()), vectors, sums.data() + k * room);
          }
          write(b, block, r / q_.stride[1], r % q_.stride[1], sums.data(), room, to);
        }
      }
    });
  }

 private:
  // The taps that fall on one remainder, the last first: in the order of the windows, as torch
  // adds.
  struct Phase {
    std::vector<int64_t> starts, taps;
  };

  std::vector<Phase> all_phases(const Blocks& b) const {
    std::vector<Phase> all(q_.stride[0] * q_.stride[1] * q_.stride[2]);
    for (int64_t t = q_.taps() - 1; t >= 0; --t) {
      const int64_t tap[3] = {t / q_.kernel[2] / q_.kernel[1], t / q_.kernel[2] % q_.kernel[1],
                              t % q_.kernel[2]};
      int64_t phase = 0, place = 0;
      for (int d = 0; d < 3; ++d) {
        const int64_t at = tap[d] * q_.dilation[d];
        phase = phase * q_.stride[d] + at % q_.stride[d];
        place = place * b.length[d] + b.margin[d] - at / q_.stride[d];
      }
      all[phase].starts.push_back(place);
      all[phase].taps.push_back(t);
    }
    return all;
  }

  void fill(const T* g, const O* offsets, const Blocks& b, int64_t block, A* errors,
            W* which) const {
    const int64_t first = b.begin(2, block) - b.margin[2], width = b.length[2];
    for (int64_t d = 0; d < b.extent(0, block) + b.margin[0]; ++d)
      for (int64_t h = 0; h < b.extent(1, block) + b.margin[1]; ++h) {
        const int64_t z = b.begin(0, block) - b.margin[0] + d;
        const int64_t v = b.begin(1, block) - b.margin[1] + h;
        const bool inside = z >= 0 && z < q_.out[0] && v >= 0 && v < q_.out[1];
        const int64_t row = inside ? (z * q_.out[1] + v) * q_.out[2] : 0;
        const int64_t size = inside ? q_.out[2] : 0, to = (d * b.length[1] + h) * b.length[2];
        loops_.split(g + row, size, first, 1, 1, width, A(0), errors + to, 0);
        loops_.split_taps(offsets + row, size, first, 1, 1, width, W(0), which + to, 0);
      }
  }

  void write(const Blocks& b, int64_t block, int64_t r0, int64_t r1, const A* sums, int64_t pitch,
             T* grad) const {
    const int64_t first = q_.begin(2, b.begin(2, block)), width = b.extent(2, block);
    for (int64_t d = 0; d < b.extent(0, block); ++d)
      for (int64_t h = 0; h < b.extent(1, block); ++h) {
        const int64_t z = q_.begin(0, b.begin(0, block) + d) + r0;
        const int64_t v = q_.begin(1, b.begin(1, block) + h) + r1;
        if (z < 0 || z >= q_.in[0] || v < 0 || v >= q_.in[1]) continue;
        loops_.merge(sums + (d * b.length[1] + h) * b.length[2], pitch, first, q_.stride[2], width,
                     grad + (z * q_.in[1] + v) * q_.in[2], q_.in[2]);
      }
  }

  Pool q_;
  PoolLoops<T, O> loops_ = TORCHBP_PICK(pool_loops<T, O>());
  int64_t places_[3];
};

template <class T, class O>
void planes_forward(const Pool& q, const T* x, T* y, O* offsets) {
  PlanesForward<T, O>(q).run(x, y, offsets);
}
template <class T, class O>
void planes_backward(const Pool& q, const T* g, const O* offsets, T* grad) {
  PlanesBackward<T, O>(q).run(g, offsets, grad);
}

#define TORCHBP_POOL(T, O)                                     \
  template void planes_forward(const Pool&, const T*, T*, O*); \
  template void planes_backward(const Pool&, const T*, const O*, T*);
#define TORCHBP_POOLS(T) TORCHBP_POOL(T, uint8_t) TORCHBP_POOL(T, int32_t)
TORCHBP_POOLS(float)
TORCHBP_POOLS(double)
TORCHBP_POOLS(bf16)
TORCHBP_POOLS(f16)

}  // namespace torchbp
