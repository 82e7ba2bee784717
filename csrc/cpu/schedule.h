// Shares out tasks of uneven cost among torch's threads: a thread that is free takes the next task. A task gives the
// same result on every thread, so that results do not depend on the number of threads either.
#pragma once

#include <ATen/Parallel.h>
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <atomic>

namespace ear_ops::cpu {

// Calls body(begin, end) on torch's threads for parts of [0, n). at::parallel_for is a template, so it would need
// OpenMP of the compiler that reads it, and the same OpenMP library as torch's. This one lies in torch and needs
// neither.
template <typename Body>
void parallel_for(int64_t n, const Body& body) {
  const auto call = [](int64_t begin, int64_t end, void* body) { (*static_cast<const Body*>(body))(begin, end); };
  const bool failed = torch_parallel_for(0, n, 1, call, const_cast<Body*>(&body));
  TORCH_CHECK(!failed, "a thread of a CPU kernel failed");
}

// Calls body(worker, next) once for each worker. next() is the next task, or `tasks` or more when none is left.
template <typename Body>
void run_tasks(int64_t tasks, int64_t workers, const Body& body) {
  std::atomic<int64_t> taken{0};
  const auto next = [&taken] { return taken.fetch_add(1, std::memory_order_relaxed); };
  parallel_for(std::min(tasks, workers), [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) body(worker, next);
  });
}

// The threads to use for this many element operations: waking one costs some microseconds.
inline int64_t workers_for(double operations) { return operations < (1 << 16) ? 1 : at::get_num_threads(); }

// Into how many shares to cut each of `tasks` tasks, at most `most`, so that every worker finds enough of them.
inline int64_t shares_per_task(int64_t tasks, int64_t workers, int64_t most) {
  constexpr int64_t kPerWorker = 4;
  if (workers == 1 || tasks == 0 || tasks >= kPerWorker * workers) return 1;
  return std::clamp<int64_t>((kPerWorker * workers + tasks - 1) / tasks, 1, std::max<int64_t>(most, 1));
}

}  // namespace ear_ops::cpu
