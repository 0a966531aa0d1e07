// Fibers, barriers and shuffles of simt.h.
#include "tests/simt.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <deque>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "tests/memory.h"

namespace simt {

Index thread_index, block_index, block_size, grid_size;

namespace {

constexpr size_t stack_size = 64 << 10;
constexpr size_t most_threads = 1024, most_dynamic = 48 << 10, most_blocks = 65535;  // of y and z

enum class State { ready, at_barrier, at_warp, done };
struct Fiber {
  jmp_buf place;  // where it left off
  std::unique_ptr<char[]> stack;
  State state;
  bool started = false;
  Site site;
  unsigned mask;          // whom it waits for in its warp
  bool orders;            // and whether that orders memory
  uint64_t given, taken;  // taken = given, from the moment on that all have come
};

std::deque<Fiber> fibers;  // stacks are kept from block to block
size_t threads, current;
jmp_buf scheduler;
Body body;
const void* arguments;
std::vector<std::unique_ptr<char[]>> scratches;
std::vector<char> dynamic;
std::vector<int> phases;
std::mt19937_64 random;
bool shuffled, in_kernel;
int launch_count, block_number, epoch;
std::string error;

Fiber& self() { return fibers[current]; }
unsigned warp_of(size_t thread) { return unsigned(thread / warp_lanes); }
size_t warp_begin(size_t thread) { return thread / warp_lanes * warp_lanes; }

Index index_of(size_t thread) {
  const size_t x = block_size.x, y = block_size.y;
  return {unsigned(thread % x), unsigned(thread / x % y), unsigned(thread / x / y)};
}
std::string text(const Index& i) {
  return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}
std::string text(const Site& site) {
  return std::string(site.file) + ":" + std::to_string(site.line);
}

// A context starts a fiber; from then on it jumps, which costs no system call.
void leave() {
  in_kernel = false;
  if (_setjmp(self().place) == 0) _longjmp(scheduler, 1);
  in_kernel = true;
}

void enter() {
  for (;;) {
    in_kernel = true;
    body(arguments);
    self().state = State::done;
    leave();  // until the next block
  }
}

void resume(Fiber& f) {
  if (_setjmp(scheduler) != 0) return;
  if (f.started) _longjmp(f.place, 1);
  f.started = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = f.stack.get();
  context.uc_stack.ss_size = stack_size;
  makecontext(&context, enter, 0);
  setcontext(&context);
}

void wait(State state, unsigned mask, Site site) {
  self().state = state;
  self().mask = mask;
  self().site = site;
  leave();
}

std::vector<size_t> order_of(size_t count) {
  std::vector<size_t> order(count);
  std::iota(order.begin(), order.end(), size_t{0});
  if (shuffled) std::shuffle(order.begin(), order.end(), random);
  return order;
}

void resume_ready() {
  for (size_t thread : order_of(threads)) {
    if (fibers[thread].state != State::ready) continue;
    current = thread;
    thread_index = index_of(thread);
    resume(self());
    if (!error.empty()) return;
  }
}

size_t count(State state) {
  return size_t(std::count_if(fibers.begin(), fibers.begin() + ptrdiff_t(threads),
                              [=](const Fiber& f) { return f.state == state; }));
}

bool waits_like(const Fiber& a, const Fiber& b) {
  return a.state == b.state && a.mask == b.mask && a.orders == b.orders &&
         a.site.line == b.site.line && std::string(a.site.file) == b.site.file;
}

// Lets the lanes go on that a waiting lane names, if all of them have come.
bool release_lanes(size_t thread) {
  const Fiber& first = fibers[thread];
  std::vector<Fiber*> lanes;
  for (unsigned lane = 0; lane < warp_lanes; ++lane) {
    if ((first.mask >> lane & 1) == 0) continue;
    const size_t other = warp_begin(thread) + lane;
    if (other >= threads || !waits_like(fibers[other], first)) return false;
    lanes.push_back(&fibers[other]);
  }
  for (Fiber* lane : lanes) lane->taken = lane->given, lane->state = State::ready;
  phases[warp_of(thread)] += first.orders;
  return true;
}

bool release_warps() {
  bool any = false;
  for (size_t thread = 0; thread < threads; ++thread)
    if (fibers[thread].state == State::at_warp) any = release_lanes(thread) || any;
  return any;
}

bool release_block() {
  for (size_t thread = 0; thread < threads; ++thread)
    if (fibers[thread].state != State::at_barrier || !waits_like(fibers[thread], fibers[0]))
      return false;
  for (size_t thread = 0; thread < threads; ++thread) fibers[thread].state = State::ready;
  ++epoch;
  return true;
}

std::string stuck() {
  for (State state : {State::at_warp, State::at_barrier})
    for (size_t thread = 0; thread < threads; ++thread) {
      const Fiber& f = fibers[thread];
      if (f.state != state) continue;
      return std::string("barrier: thread ") + text(index_of(thread)) + " waits at " +
             text(f.site) + " for others that never come; " + std::to_string(count(State::done)) +
             " have ended, " + std::to_string(count(State::at_barrier)) +
             " are at a barrier of the block, " + std::to_string(count(State::at_warp)) +
             " at one of a warp";
    }
  return "barrier: stuck";
}

void start_fibers() {
  threads = size_t(block_size.x) * block_size.y * block_size.z;
  while (fibers.size() < threads) {
    fibers.emplace_back();
    fibers.back().stack.reset(new char[stack_size]);
  }
  for (size_t thread = 0; thread < threads; ++thread) fibers[thread].state = State::ready;
}

void run_block(size_t number) {
  block_number = int(number);
  const size_t x = grid_size.x, y = grid_size.y;
  block_index = {unsigned(number % x), unsigned(number / x % y), unsigned(number / x / y)};
  epoch = 0;
  start_fibers();
  phases.assign(warp_of(threads - 1) + 1, 0);
  poison_shared(dynamic.data(), dynamic.size());
  while (error.empty() && count(State::done) < threads) {
    resume_ready();
    if (error.empty() && count(State::done) < threads && !release_warps() && !release_block())
      fail(stuck());
  }
}

}  // namespace

void fail(const std::string& message) {
  if (error.empty()) error = message;
  for (Fiber& f : fibers) f.started = false;  // what they were at is given up
  if (in_kernel) leave();
}

Moment now() {
  const int warp = int(warp_of(current));
  return {launch_count, block_number, epoch, warp, phases[size_t(warp)], int(lane_index())};
}

bool inside_kernel() { return in_kernel; }

bool on_own_stack(uintptr_t address) {
  const uintptr_t begin = uintptr_t(self().stack.get());
  return address >= begin && address < begin + stack_size;
}

std::string describe(const Moment& m) {
  const std::string lane =
      m.lane == Moment::any ? "several lanes" : "lane " + std::to_string(m.lane);
  const std::string warp =
      m.warp == Moment::any ? "several warps" : lane + " of warp " + std::to_string(m.warp);
  return m.block == Moment::any ? "several blocks" : warp + " of block " + std::to_string(m.block);
}

void run(Body kernel, const void* given, size_t size, Index grid, Index block, size_t shared) {
  if (!error.empty()) return;
  const size_t blocks = size_t(grid.x) * grid.y * grid.z;
  const size_t block_threads = size_t(block.x) * block.y * block.z;
  if (blocks == 0 || block_threads == 0 || block_threads > most_threads || grid.x > INT32_MAX ||
      grid.y > most_blocks || grid.z > most_blocks || shared > most_dynamic)
    return fail("launch: grid " + text(grid) + ", block " + text(block) + ", " +
                std::to_string(shared) + " bytes of shared memory");
  body = kernel;
  arguments = given;
  grid_size = grid;
  block_size = block;
  dynamic.assign(shared, 0);
  add_arguments(given, size);
  ++launch_count;
  for (size_t number : order_of(blocks))
    if (error.empty()) run_block(number);
}

void* dynamic_shared() { return dynamic.data(); }

void* scratch_bytes(size_t bytes) {
  scratches.emplace_back(new char[bytes]);
  std::fill_n(scratches.back().get(), bytes, char(0xff));
  add_memory(scratches.back().get(), bytes, "scratch", false);
  return scratches.back().get();
}

unsigned lane_index() { return unsigned(current % warp_lanes); }

void sync_threads(Site site) { wait(State::at_barrier, 0, site); }

void sync_warp(unsigned mask, Site site) {
  const size_t lanes = std::min<size_t>(warp_lanes, threads - warp_begin(current));
  if (mask != full_mask >> (warp_lanes - lanes))
    fail("barrier: __syncwarp with a mask that is not the warp at " + text(site));
  self().orders = true;
  wait(State::at_warp, mask, site);
}

void exchange(unsigned mask, uint64_t bits, Site site) {
  if ((mask >> lane_index() & 1) == 0)
    fail("barrier: " + describe(now()) + " is not in the mask at " + text(site));
  self().given = bits;
  self().orders = false;
  wait(State::at_warp, mask, site);
}

uint64_t value_of(unsigned lane, unsigned mask, Site site) {
  if (lane >= warp_lanes || (mask >> lane & 1) == 0)
    fail("barrier: " + describe(now()) + " takes the value of lane " + std::to_string(lane) +
         ", which is not in the mask, at " + text(site));
  return fibers[warp_begin(current) + lane].taken;
}

}  // namespace simt

extern "C" {

// Before an entry. Seed 0 keeps the order of blocks and threads.
void simt_begin(uint64_t seed) {
  simt::error.clear();
  simt::scratches.clear();
  simt::forget_memory();
  simt::shuffled = seed != 0;
  simt::random.seed(seed);
}

// A tensor that the entry may use.
void simt_memory(void* begin, size_t bytes, const char* name) {
  simt::add_memory(begin, bytes, name, true);
}

// After an entry: what went wrong, or "".
const char* simt_error() { return simt::error.c_str(); }
}
