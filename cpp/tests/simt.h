// Runs CUDA kernels on the CPU, one block after another, the threads of a block as fibers that take
// turns. A barrier that some threads of a block reach and others never do is found, and reported.
#pragma once
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __shared__ static  // blocks run one by one, so that one copy will do

namespace simt {

struct Index {
  unsigned x = 0, y = 0;
};
struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done = false, waiting = false;
};

inline Index thread_index, block_index, block_size, grid_size;
inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline size_t current;
inline std::function<void()> body;

inline void yield() { swapcontext(&fibers[current].context, &scheduler); }

inline void enter() {
  body();
  fibers[current].done = true;
  yield();
}

inline void run_block() {
  constexpr size_t stack_size = 64 << 10;
  fibers.resize(block_size.x * block_size.y);  // stacks are kept from block to block
  for (Fiber& f : fibers) {
    if (!f.stack) f.stack.reset(new char[stack_size]);
    f.done = f.waiting = false;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = stack_size;
    makecontext(&f.context, enter, 0);
  }
  for (size_t done = 0; done < fibers.size();) {
    size_t waiting = 0;
    done = 0;
    for (current = 0; current < fibers.size(); ++current) {
      Fiber& f = fibers[current];
      if (!f.done) {
        thread_index = {unsigned(current % block_size.x), unsigned(current / block_size.x)};
        f.waiting = false;
        swapcontext(&scheduler, &f.context);
      }
      waiting += f.waiting;
      done += f.done;
    }
    if (waiting > 0 && done > 0) {
      std::fprintf(stderr, "simt: %zu threads wait for %zu that have ended\n", waiting, done);
      std::abort();
    }
  }
}

// launch(grid, block, kernel, arguments...) stands for kernel<<<grid, block>>>(arguments...).
template <class Kernel, class... Arguments>
void launch(Index grid, Index block, Kernel kernel, Arguments... arguments) {
  body = [=] { kernel(arguments...); };
  grid_size = grid;
  block_size = block;
  for (block_index.y = 0; block_index.y < grid.y; ++block_index.y)
    for (block_index.x = 0; block_index.x < grid.x; ++block_index.x) run_block();
}

}  // namespace simt

#define threadIdx simt::thread_index
#define blockIdx simt::block_index
#define blockDim simt::block_size
#define gridDim simt::grid_size
inline void __syncthreads() {
  simt::fibers[simt::current].waiting = true;
  simt::yield();
}
