#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <tuple>

#include "cpu/isa.h"
#include "cpu/memory.h"
#include "torchbp/dropout.h"

#define TORCHBP_LOOPS "cpu/bernoulli_loops.inc"
#include "cpu/each_isa.inc"

namespace torchbp {

// What torch.Generator.get_state() gives for a generator of the CPU, up to the words.
struct GeneratorState {
  uint64_t seed;
  int32_t left, seeded;  // one more than the words that are left
  uint64_t next;
  uint64_t words[624];
};
static constexpr int64_t state_bytes = 5056;  // normal numbers kept for later stand at the end

// The numbers of torch's generator: MT19937, refreshed when the next number is asked for.
class Numbers {
 public:
  explicit Numbers(const GeneratorState& s) : left_(s.left - 1), next_(int64_t(s.next)) {
    for (int i = 0; i < 624; ++i) words_[i] = uint32_t(s.words[i]);
  }

  void draw(int64_t n, uint32_t* to) {
    while (n > 0) {
      if (left_ == 0) {
        TORCHBP_PICK(twist)(words_);
        left_ = 624;
        next_ = 0;
      }
      const int64_t m = std::min(n, left_);
      TORCHBP_PICK(temper)(words_ + next_, m, to);
      left_ -= m;
      next_ += m;
      n -= m;
      to += m;
    }
  }

  void store(GeneratorState& s) const {
    s.left = int32_t(left_ + 1);
    s.next = uint64_t(next_);
    for (int i = 0; i < 624; ++i) s.words[i] = words_[i];
  }

 private:
  int64_t left_, next_;
  uint32_t words_[624];
};

static GeneratorState read_state(const Tensor& state) {
  STD_TORCH_CHECK(state.scalar_type() == ScalarType::Byte && state.numel() == state_bytes,
                  "state: expected ", state_bytes, " bytes, got ", state.numel(), " of ",
                  torch::headeronly::toString(state.scalar_type()));
  GeneratorState s;
  std::memcpy(&s, state.const_data_ptr(), sizeof s);
  STD_TORCH_CHECK(s.left >= 1 && s.next + uint64_t(s.left) <= 625,
                  "state: expected that of a generator of the CPU");
  return s;
}

static std::tuple<Tensor, Tensor> bernoulli_bits_cpu(const Tensor& state_, int64_t count,
                                                     double p) {
  STD_TORCH_CHECK(count >= 0, "count: expected 0 or more, got ", count);
  STD_TORCH_CHECK(p >= 0 && p <= 1, "p: expected 0 to 1, got ", p);
  constexpr int64_t at_once = 4096;
  const Tensor state = packed(state_);
  GeneratorState s = read_state(state);
  const Tensor bits = fresh(state, {ceil_div(count, 8)}, ScalarType::Byte);
  const Tensor after = fresh(state, {state_bytes}, ScalarType::Byte);
  const int64_t below = int64_t(std::ceil(std::ldexp(p, 53)));
  Numbers numbers(s);
  alignas(64) uint32_t drawn[2 * at_once];
  for (int64_t first = 0; first < count; first += at_once) {
    const int64_t n = std::min(at_once, count - first);
    numbers.draw(2 * n, drawn);
    TORCHBP_PICK(bits_below)(drawn, n, below, output<uint8_t>(bits) + first / 8);
  }
  numbers.store(s);
  uint8_t* to = output<uint8_t>(after);
  std::memcpy(to, state.const_data_ptr(), state_bytes);
  std::memcpy(to, &s, sizeof s);
  return {bits, after};
}

}  // namespace torchbp

STABLE_TORCH_LIBRARY_FRAGMENT(torchbp, m) {
  m.def("bernoulli_bits(Tensor state, int count, float p) -> (Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(torchbp, CPU, m) {
  m.impl("bernoulli_bits", TORCH_BOX(&torchbp::bernoulli_bits_cpu));
}
