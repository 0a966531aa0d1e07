// torch's parallel_for on threads that the thread sanitizer sees; TORCHBP_SANITIZE=thread links it
// in place of torch's own, whose OpenMP runtime is not instrumented. It ignores the grain, so that
// small inputs are shared out too.
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

extern "C" AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t,
                                             ParallelFunc function, void* context) {
  constexpr int64_t most_threads = 4;
  const int64_t size = std::max<int64_t>(1, (end - begin + most_threads - 1) / most_threads);
  std::atomic<AOTITorchError> error = AOTI_TORCH_SUCCESS;
  std::vector<std::thread> threads;
  for (int64_t first = begin; first < end; first += size)
    threads.emplace_back([=, &error] {
      try {
        function(first, std::min(end, first + size), context);
      } catch (...) {
        error = AOTI_TORCH_FAILURE;
      }
    });
  for (std::thread& thread : threads) thread.join();
  return error;
}
