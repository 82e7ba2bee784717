// Fibers, meetings and checks behind primitives.h.
#include "host.h"

#include <dlfcn.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/cuda/hopper.cuh"

namespace ear_ops::cuda::host {

namespace {

constexpr size_t kStack = 256 * 1024;

struct Copy {
  void* to;
  const void* from;
  int bytes;
  bool real;
};

struct Barrier {  // in shared memory
  int expected, missing, bytes, phase;
};

struct Box {  // a copy of a tile that is on its way
  char* to;
  BoxedTensor tensor;
  int corner[4];
  Barrier* barrier;
};

struct Product {  // of one lane, that is not made yet
  int type;
  float (*sums)[4];
  const char *a, *b;
  bool adds, follows;  // another product of the same sums
  float left[2][16];   // in place of a, where that is null: of rows g and g + 8
  float start[8][4];
};

struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStack]};
  ucontext_t start;
  jmp_buf resume;
  bool started, finished, waiting;
  Meeting meeting;
  Exchange exchange;
  std::vector<std::vector<Copy>> copies;  // groups; the last is not committed yet
  std::vector<Product> products;
  size_t committed;  // of the products
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
  bool hopper = true;
  std::map<const void*, Barrier> barriers;
  std::vector<Box> boxes;
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
  constexpr const char* kNames[] = {"sync_block",   "sync_warp",     "shuffle_xor",
                                    "ballot",       "load_matrices", "load_matrices",
                                    "multiply_add", "wait_phase",    "add_weighted_async"};
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
    case Meeting::kShareFactors:
      for (int lane = 0; lane < kWarp; ++lane)
        for (int other = 0; other < kWarp; ++other)
          std::memcpy(lanes[lane]->factors[other], lanes[other]->in, sizeof(lanes[lane]->factors[other]));
      return;
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

Barrier& barrier_at(const void* address) {
  const auto place = state.barriers.find(address);
  if (place == state.barriers.end()) fail("no barrier was made here");
  return place->second;
}

void end_phase(Barrier* barrier) {
  if (barrier->missing || barrier->bytes) return;
  ++barrier->phase;
  barrier->missing = barrier->expected;
}

bool phases_have_ended(int begin, int end) {
  for (int i = begin; i < end; ++i) {
    const Exchange& of = state.fibers[i].exchange;
    const auto place = state.barriers.find(of.address);
    if (place == state.barriers.end()) {
      state.error = "wait_phase: no barrier was made here (block " + std::to_string(state.block) + ")";
      return false;
    }
    if (static_cast<uint32_t>(place->second.phase & 1) == of.in[0]) return false;
  }
  return true;
}

// Where 16 bytes of a tile lie: bits 7 to 9 of the address change bits 4 to 6.
char* swizzled(const char* address) {
  const auto bits = reinterpret_cast<uintptr_t>(address);
  return reinterpret_cast<char*>(bits ^ (bits >> 7 & 7) << 4);
}

// The last copy of a tile that was started arrives. Returns whether there was one.
bool deliver() {
  if (state.boxes.empty()) return false;
  const Box box = state.boxes.back();
  state.boxes.pop_back();
  const BoxedTensor& of = box.tensor;
  for (uint64_t row = 0; row < of.box_rows; ++row)
    for (int place = 0; place < 8; ++place) {
      char* to = swizzled(box.to + row * kTileRowBytes + place * 16);
      const uint64_t feature = box.corner[0] + 8 * place, index = box.corner[1] + row;
      std::memset(to, 0, 16);
      if (feature >= of.sizes[0] || index >= of.sizes[1]) continue;
      const uint64_t from =
          of.data + 2 * feature + index * of.strides[0] + box.corner[2] * of.strides[1] + box.corner[3] * of.strides[2];
      try {
        check_global(reinterpret_cast<const void*>(from), 16);
      } catch (const Failed&) {
        return true;
      }
      std::memcpy(to, reinterpret_cast<const void*>(from), 16);
    }
  box.barrier->bytes -= static_cast<int>(of.box_rows) * kTileRowBytes;
  end_phase(box.barrier);
  return true;
}

// One warp up to the next barrier, or its end. Returns whether a thread has run.
bool run_warp(int begin, int end, const std::vector<int>& order) {
  Meeting meeting;
  bool runs = false;
  const auto can_run = [&]() {
    for (int i = begin; i < end; ++i)
      if (!state.fibers[i].finished && !state.fibers[i].waiting) return runs = true;
    return false;
  };
  while (can_run(), run_to_meeting(begin, end, order, &meeting)) {
    if (meeting == Meeting::kBlock || (meeting == Meeting::kPhase && !phases_have_ended(begin, end))) return runs;
    Exchange* lanes[kWarp];
    for (int i = begin; i < end; ++i) {
      lanes[i - begin] = &state.fibers[i].exchange;
      state.fibers[i].waiting = false;
    }
    exchange_of(meeting, lanes);
  }
  return runs;
}

void run_block(int threads, std::mt19937_64& random) {
  std::fill(state.shared.begin(), state.shared.end(), char(0xff));
  for (Fiber& fiber : state.fibers) {
    fiber.started = fiber.finished = fiber.waiting = false;
    fiber.copies.assign(1, {});
    fiber.products.clear();
    fiber.committed = 0;
  }
  state.barriers.clear();
  state.boxes.clear();
  std::vector<int> warps(threads / kWarp);
  std::iota(warps.begin(), warps.end(), 0);
  while (state.error.empty()) {
    std::shuffle(warps.begin(), warps.end(), random);
    bool runs = false;
    for (const int warp : warps) {
      std::vector<int> order(kWarp);
      std::iota(order.begin(), order.end(), warp * kWarp);
      std::shuffle(order.begin(), order.end(), random);
      runs |= run_warp(warp * kWarp, (warp + 1) * kWarp, order);
    }
    const auto finished =
        std::count_if(state.fibers.begin(), state.fibers.end(), [](const Fiber& f) { return f.finished; });
    if (!state.error.empty()) return;
    if (finished == threads) {
      if (!state.boxes.empty()) state.error = "copy_box: a tile is still on its way when the block has ended";
      return;
    }
    const bool phases = std::any_of(state.fibers.begin(), state.fibers.end(),
                                    [](const Fiber& f) { return !f.finished && f.meeting == Meeting::kPhase; });
    if (phases) {
      if (!runs && !deliver())
        state.error = "wait_phase: a phase never ends (block " + std::to_string(state.block) + ")";
      continue;
    }
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

void init_barrier(void* barrier, int arrivals) {
  check_shared(barrier, 8);
  state.barriers[barrier] = {arrivals, arrivals, 0, 0};
}
void arrive(void* barrier, int bytes) {
  Barrier& of = barrier_at(barrier);
  of.bytes += bytes;
  --of.missing;
  end_phase(&of);
}
void wait_phase(void* barrier, int parity) {
  own().address = barrier, own().in[0] = static_cast<uint32_t>(parity);
  meet(Meeting::kPhase);
}

void copy_box(void* shared, const TensorMap& map, const int (&corner)[4], void* barrier) {
  Box box{static_cast<char*>(shared), {}, {corner[0], corner[1], corner[2], corner[3]}, &barrier_at(barrier)};
  std::memcpy(&box.tensor, &map, sizeof(box.tensor));
  const int64_t bytes = static_cast<int64_t>(box.tensor.box_rows) * kTileRowBytes;
  if (box.to < state.shared_begin || box.to + bytes > state.shared_begin + state.shared_bytes)
    fail("copy_box: outside of shared memory");
  if (reinterpret_cast<uintptr_t>(box.to) % 1024) fail("copy_box: a tile must begin at a multiple of 1024 bytes");
  std::memset(box.to, 0xff, bytes);
  state.boxes.push_back(box);
}

static void start(Product product) {
  auto& products = state.fibers[state.running].products;
  for (const Product& before : products) product.follows |= before.sums == product.sums;
  if (product.adds) std::memcpy(product.start, product.sums, sizeof(product.start));
  std::memset(product.sums, 0xff, sizeof(product.start));
  products.push_back(product);
}
void start_product(int type, float (*sums)[4], const char* a, const char* b, bool adds) {
  start({type, sums, a, b, adds, false, {}, {}});
}
void start_weighted(int type, float (*sums)[4], const uint32_t (&a)[4], const char* b) {
  std::memcpy(own().in, a, sizeof(a));
  meet(Meeting::kShareFactors);
  Product product{type, sums, nullptr, b, true, false, {}, {}};
  const int g = state.running % kWarp / 4;
  for (int half = 0; half < 2; ++half)
    for (int k = 0; k < 16; ++k)
      product.left[half][k] = element(type, own().factors[4 * g + k % 8 / 2][half + k / 8 * 2], k % 2);
  start(product);
}
void commit_products() { state.fibers[state.running].committed = state.fibers[state.running].products.size(); }

// Each of the four warps of a group makes 16 rows of its products, and each lane its part of them.
void finish_products() {
  Fiber& fiber = state.fibers[state.running];
  const int lane = state.running % kWarp, first_row = state.running / kWarp % 4 * 16;
  const auto number = [](const Product& of, const char* base, int row, int k) {
    const char* begin = base + row / 8 * (8 * kTileRowBytes) + row % 8 * kTileRowBytes;
    const char* place = swizzled(begin + k / 8 * 16) + k % 8 * 2;
    check_shared(place, 2);
    uint16_t bits;
    std::memcpy(&bits, place, 2);
    return element(of.type, bits, 0);
  };
  for (size_t p = 0; p < fiber.committed; ++p) {
    Product& of = fiber.products[p];
    float a[2][16];
    for (int half = 0; half < 2; ++half)
      for (int k = 0; k < 16; ++k)
        a[half][k] = of.a ? number(of, of.a, first_row + lane / 4 + 8 * half, k) : of.left[half][k];
    for (int n = 0; n < 8; ++n)
      for (int odd = 0; odd < 2; ++odd) {
        double total[2];
        for (int half = 0; half < 2; ++half)
          total[half] = of.adds ? of.follows ? of.sums[n][2 * half + odd] : of.start[n][2 * half + odd] : 0;
        for (int k = 0; k < 16; ++k) {
          const int column = 8 * n + lane % 4 * 2 + odd;
          const double b = of.a ? number(of, of.b, column, k) : number(of, of.b, k, column);
          for (int half = 0; half < 2; ++half) total[half] += a[half][k] * b;
        }
        for (int half = 0; half < 2; ++half) of.sums[n][2 * half + odd] = round_to_zero(total[half]);
      }
  }
  fiber.products.erase(fiber.products.begin(), fiber.products.begin() + static_cast<int64_t>(fiber.committed));
  fiber.committed = 0;
}
bool is_hopper() { return state.hopper; }
void set_hopper(bool is_hopper) { state.hopper = is_hopper; }

float round_to_zero(double value) {
  const float nearest = static_cast<float>(value);
  if (!std::isfinite(nearest) || std::fabs(static_cast<double>(nearest)) <= std::fabs(value)) return nearest;
  return std::nextafter(nearest, 0.0f);
}

int64_t shared_limit() { return state.limit; }
void set_shared_limit(int64_t bytes) { state.limit = bytes; }
void set_seed(uint64_t seed) { state.seed = seed; }
void allow(const void* data, int64_t bytes) { state.tensors.push_back({static_cast<const char*>(data), bytes, 0}); }
void spoil(void* data, int64_t bytes) {
  std::memset(data, 0xff, bytes);
  state.tensors.push_back({static_cast<const char*>(data), bytes, 1});
}
void spoil_scratch(void* data, int64_t bytes) {
  spoil(data, bytes);
  state.tensors.back().writes = 2;
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
