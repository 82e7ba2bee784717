// Fibers, meetings and checks behind primitives.h.
#include "host.h"

#include <dlfcn.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/cuda/primitives.cuh"

namespace ear_ops::cuda::host {

namespace {

constexpr size_t kStack = 256 * 1024;

struct Copy {
  void* to;
  const void* from;
  int bytes;
  bool real;
};

struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStack]};
  ucontext_t start;
  jmp_buf resume;
  bool started, finished, waiting;
  Meeting meeting;
  Exchange exchange;
  std::vector<std::vector<Copy>> copies;  // groups; the last is not committed yet
};

struct Failed {};  // unwinds a fiber whose block has failed

struct State {
  std::vector<Memory> tensors;
  Device device = nullptr;
  std::vector<Fiber> fibers;
  std::vector<char> shared;
  char* shared_begin = nullptr;
  int64_t shared_bytes = 0, block = 0;
  int running = 0;
  const std::function<void()>* kernel = nullptr;
  jmp_buf scheduler;
  std::string error;
  uint64_t seed = 0;
  int64_t limit = 227 * 1024;
} state;

void fail(const std::string& what) {
  if (state.error.empty())
    state.error = what + " (block " + std::to_string(state.block) + ", thread " + std::to_string(state.running) + ")";
  throw Failed();
}

void enter() {
  Fiber& fiber = state.fibers[state.running];
  try {
    (*state.kernel)();
  } catch (const Failed&) {
  }
  fiber.finished = true;
  _longjmp(state.scheduler, 1);
}

void resume(int thread) {
  Fiber& fiber = state.fibers[thread];
  state.running = thread;
  if (_setjmp(state.scheduler)) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack.get();
  fiber.start.uc_stack.ss_size = kStack;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, enter, 0);
  setcontext(&fiber.start);
}

const char* name(Meeting meeting) {
  constexpr const char* kNames[] = {"sync_block",    "sync_warp",     "shuffle_xor", "ballot",
                                    "load_matrices", "load_matrices", "multiply_add"};
  return kNames[static_cast<int>(meeting)];
}

float element(int type, uint32_t word, int half) {
  const uint16_t bits = static_cast<uint16_t>(word >> 16 * half);
  return type == 0 ? to_float(bfloat16{bits}) : to_float(float16{bits});
}

// d = a b + c as lanes hold it (PTX: mma.m16n8k16).
void multiply_add_of(Exchange* lanes[kWarp]) {
  const int type = lanes[0]->type;
  float a[16][16], b[16][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    const int g = lane / 4, t = lane % 4;
    const Exchange& of = *lanes[lane];
    for (int i = 0; i < 4; ++i)
      for (int half = 0; half < 2; ++half) {
        a[g + 8 * (i % 2)][2 * t + half + 8 * (i / 2)] = element(type, of.in[i], half);
        if (i < 2) b[2 * t + half + 8 * i][g] = element(type, of.in[4 + i], half);
      }
  }
  for (int lane = 0; lane < kWarp; ++lane)
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
      double sum = bits_as_float(lanes[lane]->out[i]);
      for (int k = 0; k < 16; ++k) sum += static_cast<double>(a[row][k]) * b[k][column];
      lanes[lane]->out[i] = float_as_bits(round_to_zero(sum));
    }
}

void load_matrices_of(Exchange* lanes[kWarp], bool transposed) {
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t values[8][8];
    for (int row = 0; row < 8; ++row) std::memcpy(values[row], lanes[matrix * 8 + row]->address, 16);
    for (int lane = 0; lane < kWarp; ++lane) {
      const int g = lane / 4, t = lane % 4;
      const uint32_t low = transposed ? values[2 * t][g] : values[g][2 * t];
      const uint32_t high = transposed ? values[2 * t + 1][g] : values[g][2 * t + 1];
      lanes[lane]->out[matrix] = low | high << 16;
    }
  }
}

void exchange_of(Meeting meeting, Exchange* lanes[kWarp]) {
  switch (meeting) {
    case Meeting::kShuffle:
      for (int lane = 0; lane < kWarp; ++lane) lanes[lane]->out[0] = lanes[lane ^ lanes[lane]->in[1]]->in[0];
      return;
    case Meeting::kBallot: {
      uint32_t votes = 0;
      for (int lane = 0; lane < kWarp; ++lane) votes |= (lanes[lane]->in[0] & 1) << lane;
      for (int lane = 0; lane < kWarp; ++lane) lanes[lane]->out[0] = votes;
      return;
    }
    case Meeting::kLoadMatrices:
    case Meeting::kLoadMatricesTransposed:
      return load_matrices_of(lanes, meeting == Meeting::kLoadMatricesTransposed);
    case Meeting::kMultiplyAdd:
      return multiply_add_of(lanes);
    default:
      return;
  }
}

// Runs the fibers of [begin, end) until all of them wait or have finished; then they must all be in the same place.
bool run_to_meeting(int begin, int end, const std::vector<int>& order, Meeting* meeting) {
  for (const int thread : order)
    if (!state.fibers[thread].finished && !state.fibers[thread].waiting) resume(thread);
  int finished = 0;
  for (int i = begin; i < end; ++i) finished += state.fibers[i].finished;
  if (!state.error.empty() || finished == end - begin) return false;
  *meeting = Meeting::kBlock;
  for (int i = begin; i < end; ++i)
    if (!state.fibers[i].finished) *meeting = state.fibers[i].meeting;
  for (int i = begin; i < end; ++i) {
    if (!state.fibers[i].finished && state.fibers[i].meeting == *meeting) continue;
    state.error = std::string(name(*meeting)) + ": not every thread of a warp is there (block " +
                  std::to_string(state.block) + ", thread " + std::to_string(i) + " " +
                  (state.fibers[i].finished ? "has finished" : std::string("is in ") + name(state.fibers[i].meeting)) +
                  ")";
    return false;
  }
  return true;
}

// One warp up to the next barrier of the block, or its end.
void run_warp(int begin, int end, const std::vector<int>& order) {
  Meeting meeting;
  while (run_to_meeting(begin, end, order, &meeting)) {
    if (meeting == Meeting::kBlock) return;
    Exchange* lanes[kWarp];
    for (int i = begin; i < end; ++i) {
      lanes[i - begin] = &state.fibers[i].exchange;
      state.fibers[i].waiting = false;
    }
    exchange_of(meeting, lanes);
  }
}

void run_block(int threads, std::mt19937_64& random) {
  std::fill(state.shared.begin(), state.shared.end(), char(0xff));
  for (Fiber& fiber : state.fibers) {
    fiber.started = fiber.finished = fiber.waiting = false;
    fiber.copies.assign(1, {});
  }
  std::vector<int> warps(threads / kWarp);
  std::iota(warps.begin(), warps.end(), 0);
  while (state.error.empty()) {
    std::shuffle(warps.begin(), warps.end(), random);
    for (const int warp : warps) {
      std::vector<int> order(kWarp);
      std::iota(order.begin(), order.end(), warp * kWarp);
      std::shuffle(order.begin(), order.end(), random);
      run_warp(warp * kWarp, (warp + 1) * kWarp, order);
    }
    const auto finished =
        std::count_if(state.fibers.begin(), state.fibers.end(), [](const Fiber& f) { return f.finished; });
    if (!state.error.empty() || finished == threads) return;
    if (finished > 0)
      state.error = "sync_block: some threads have finished (block " + std::to_string(state.block) + ")";
    for (Fiber& fiber : state.fibers) fiber.waiting = false;
  }
}

void check_aligned(const void* address, int64_t bytes, const char* what) {
  if (reinterpret_cast<uintptr_t>(address) % bytes)
    fail(std::string(what) + ": an access of " + std::to_string(bytes) + " bytes is not aligned");
}

}  // namespace

int thread() { return state.running; }
int64_t block() { return state.block; }
char* shared() { return state.shared_begin; }
Exchange& own() { return state.fibers[state.running].exchange; }

void meet(Meeting meeting) {
  Fiber& fiber = state.fibers[state.running];
  fiber.meeting = meeting;
  fiber.waiting = true;
  if (!_setjmp(fiber.resume)) _longjmp(state.scheduler, 1);
  if (!state.error.empty()) throw Failed();
}

void check_shared(const void* address, int64_t bytes) {
  const char* begin = static_cast<const char*>(address);
  if (begin < state.shared_begin || begin + bytes > state.shared_begin + state.shared_bytes)
    fail("shared memory: an access of " + std::to_string(bytes) + " bytes at offset " +
         std::to_string(begin - state.shared_begin) + " of " + std::to_string(state.shared_bytes));
  check_aligned(address, bytes, "shared memory");
}

void check_global(const void* address, int64_t bytes) {
  const char* begin = static_cast<const char*>(address);
  for (const Memory& tensor : state.tensors)
    if (begin >= tensor.data && begin + bytes <= tensor.data + tensor.bytes)
      return check_aligned(address, bytes, "global memory");
  fail("global memory: an access of " + std::to_string(bytes) + " bytes outside of every tensor");
}

void copy_later(void* to, const void* from, int bytes, bool real) {
  std::memset(to, 0xff, bytes);
  state.fibers[state.running].copies.back().push_back({to, from, bytes, real});
}
void commit() { state.fibers[state.running].copies.emplace_back(); }
void wait(int groups) {
  auto& copies = state.fibers[state.running].copies;
  while (static_cast<int>(copies.size()) - 1 > groups) {
    for (const Copy& copy : copies.front()) {
      std::memset(copy.to, 0, copy.bytes);
      if (copy.real) std::memcpy(copy.to, copy.from, copy.bytes);
    }
    copies.erase(copies.begin());
  }
}

float round_to_zero(double value) {
  const float nearest = static_cast<float>(value);
  if (!std::isfinite(nearest) || std::fabs(static_cast<double>(nearest)) <= std::fabs(value)) return nearest;
  return std::nextafter(nearest, 0.0f);
}

int64_t shared_limit() { return state.limit; }
void set_shared_limit(int64_t bytes) { state.limit = bytes; }
void set_seed(uint64_t seed) { state.seed = seed; }
void allow(const void* data, int64_t bytes) { state.tensors.push_back({static_cast<const char*>(data), bytes, false}); }
void spoil(void* data, int64_t bytes) {
  std::memset(data, 0xff, bytes);
  state.tensors.push_back({static_cast<const char*>(data), bytes, true});
}
void forbid_all() { state.tensors.clear(); }
const std::vector<Memory>& memory() { return state.tensors; }
void set_device(Device device) { state.device = device; }

const char* run(const Kernel& kernel, int64_t blocks, int threads, int64_t shared_bytes) {
  if (threads % kWarp) return "a block must hold whole warps";
  if (state.device) {
    Dl_info symbol;
    if (!dladdr(kernel.function, &symbol) || !symbol.dli_sname) return "the kernel has no name";
    return state.device(symbol.dli_sname, blocks, threads, shared_bytes, kernel.args, kernel.args_bytes);
  }
  state.kernel = &kernel.body;
  state.error.clear();
  state.fibers.resize(threads);
  state.shared.resize(shared_bytes + 128);
  state.shared_begin = state.shared.data() + (128 - reinterpret_cast<uintptr_t>(state.shared.data()) % 128);
  state.shared_bytes = shared_bytes;
  std::mt19937_64 random(state.seed);
  std::vector<int64_t> order(blocks);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random);
  for (const int64_t block : order) {
    state.block = block;
    run_block(threads, random);
    if (!state.error.empty()) return state.error.c_str();
  }
  return nullptr;
}

}  // namespace ear_ops::cuda::host
