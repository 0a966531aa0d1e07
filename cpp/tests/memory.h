// What simt knows of memory: which bytes there are, who touched them last, which are undefined.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

namespace simt {

// A point in the run of a kernel. Two are ordered if a barrier lies between: epoch counts those of
// the block, phase those of the warp.
struct Moment {
  static constexpr int any = -1;  // several of one kind
  int launch = 0, block = 0, epoch = 0, warp = 0, phase = 0, lane = 0;
};

// Ends the launch with an error, and never returns to the kernel.
void fail(const std::string& message);
Moment now();
bool inside_kernel();
bool on_own_stack(uintptr_t address);
std::string describe(const Moment& moment);

void forget_memory();
void add_memory(void* begin, size_t bytes, const std::string& name, bool defined);
void add_arguments(const void* begin, size_t bytes);  // of the current launch
// Fills the shared arrays with NaN; they belong to a new block.
void poison_shared(char* dynamic, size_t bytes);

}  // namespace simt
