// Every read and write of a kernel comes by here: families are compiled with -fsanitize=thread, but
// linked with the functions below in place of the compiler's runtime.
#include "tests/memory.h"

#include <link.h>

#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "tests/simt.h"

namespace simt {
namespace {

struct Cell {  // one byte
  Moment read, write;
  bool defined = false;
};
struct Range {
  uintptr_t begin = 0, end = 0;
  std::string name;
  std::vector<Cell> cells;

  Range(const void* at, size_t bytes, std::string called, bool defined)
      : begin(uintptr_t(at)), end(begin + bytes), name(std::move(called)), cells(bytes) {
    for (Cell& cell : cells) cell.defined = defined;
  }
  bool holds(uintptr_t address) const { return address >= begin && address < end; }
};

std::vector<Range> tensors, shared;
std::pair<uintptr_t, uintptr_t> arguments;

thread_local volatile char anchor;

struct Image {  // this library, and its thread-local memory: the shared arrays
  std::vector<std::pair<uintptr_t, uintptr_t>> parts;
  void* thread_local_data = nullptr;
  size_t thread_local_size = 0;
};

int find_image(dl_phdr_info* info, size_t, void* result) {
  Image image;
  bool own = false;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& part = info->dlpi_phdr[i];
    const uintptr_t begin = info->dlpi_addr + part.p_vaddr, end = begin + part.p_memsz;
    if (part.p_type == PT_TLS) {
      image.thread_local_data = info->dlpi_tls_data;
      image.thread_local_size = part.p_memsz;
    }
    if (part.p_type != PT_LOAD) continue;
    image.parts.emplace_back(begin, end);
    own = own || (uintptr_t(&tensors) >= begin && uintptr_t(&tensors) < end);
  }
  if (own) *static_cast<Image*>(result) = image;
  return own;
}

const Image& image() {
  static const Image found = [] {
    anchor = 1;  // thread-local memory is there from its first use on
    Image result;
    dl_iterate_phdr(find_image, &result);
    return result;
  }();
  return found;
}

Range* range_of(uintptr_t address) {
  for (std::vector<Range>* ranges : {&shared, &tensors})
    for (Range& range : *ranges)
      if (range.holds(address)) return &range;
  return nullptr;
}

bool readable(uintptr_t address) {  // constants, indices and arguments
  if (address >= arguments.first && address < arguments.second) return true;
  for (const auto& [begin, end] : image().parts)
    if (address >= begin && address < end) return true;
  return false;
}

bool ordered(const Moment& earlier, const Moment& later) {
  if (earlier.launch != later.launch) return true;
  if (earlier.block != later.block) return false;
  if (earlier.epoch != later.epoch) return true;
  if (earlier.warp != later.warp) return false;
  return earlier.phase != later.phase || earlier.lane == later.lane;
}

// The readers since the last barrier, as one.
Moment joined(const Moment& earlier, Moment later) {
  if (earlier.launch != later.launch) return later;
  if (earlier.block != later.block)
    later.block = Moment::any;
  else if (earlier.epoch == later.epoch && earlier.warp != later.warp)
    later.warp = Moment::any;
  else if (earlier.epoch == later.epoch && earlier.phase == later.phase &&
           earlier.lane != later.lane)
    later.lane = Moment::any;
  return later;
}

void touch(uintptr_t address, size_t size, bool write) {
  if (!inside_kernel() || on_own_stack(address)) return;
  const char* verb = write ? " writes " : " reads ";
  const Moment moment = now();
  Range* range = nullptr;
  for (uintptr_t byte = address; byte < address + size; ++byte) {
    if (range == nullptr || !range->holds(byte)) range = range_of(byte);
    if (range == nullptr) {
      if (!write && readable(byte)) continue;
      return fail("memory: " + describe(moment) + verb + std::to_string(size) +
                  " bytes outside of every tensor and shared array");
    }
    Cell& cell = range->cells[byte - range->begin];
    const auto where = [&] {
      return range->name + " at byte " + std::to_string(byte - range->begin);
    };
    if (!write && !cell.defined)
      return fail("uninitialised: " + describe(moment) + " reads " + where());
    if (!ordered(cell.write, moment))
      return fail("race: " + describe(moment) + verb + where() + ", written by " +
                  describe(cell.write));
    if (write && !ordered(cell.read, moment))
      return fail("race: " + describe(moment) + verb + where() + ", read by " +
                  describe(cell.read));
    if (write)
      cell.write = moment, cell.defined = true;
    else
      cell.read = joined(cell.read, moment);
  }
}

}  // namespace

void forget_memory() {
  tensors.clear();
  shared.clear();
  arguments = {};
}

void add_memory(void* begin, size_t bytes, const std::string& name, bool defined) {
  if (bytes > 0) tensors.emplace_back(begin, bytes, name, defined);
}

void add_arguments(const void* begin, size_t bytes) {
  arguments = {uintptr_t(begin), uintptr_t(begin) + bytes};
}

void poison_shared(char* dynamic, size_t bytes) {
  shared.clear();
  const auto add = [](void* at, size_t size, const char* name) {
    std::memset(at, 0xff, size);  // NaN in every floating point type, -1 in the others
    shared.emplace_back(at, size, name, false);
  };
  if (bytes > 0) add(dynamic, bytes, "dynamic shared memory");
  add(image().thread_local_data, image().thread_local_size, "shared memory");
}

}  // namespace simt

#define HOOK(name, size, write) \
  void __tsan_##name(void* address) { simt::touch(uintptr_t(address), size, write); }
#define HOOKS(size)                       \
  HOOK(read##size, size, false)           \
  HOOK(write##size, size, true)           \
  HOOK(unaligned_read##size, size, false) \
  HOOK(unaligned_write##size, size, true) \
  HOOK(volatile_read##size, size, false)  \
  HOOK(volatile_write##size, size, true)

extern "C" {
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
void __tsan_read_range(void* address, size_t size) { simt::touch(uintptr_t(address), size, false); }
void __tsan_write_range(void* address, size_t size) { simt::touch(uintptr_t(address), size, true); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
}
