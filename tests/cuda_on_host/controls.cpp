// What tests set before they call a kernel, and kernels with one mistake each, which must be reported.
#include <torch/library.h>

#include "../../csrc/cuda/primitives.cuh"
#include "host.h"

namespace ear_ops::cuda {
namespace {

struct Memory {
  float* data;  // 64 floats, of which a block may touch all
  int64_t mistake;
};

float* shared_floats() { return reinterpret_cast<float*>(shared_memory()); }

void mistaken(Memory m) {
  const int thread = thread_index(), other = (thread + kWarp) % 64;
  switch (m.mistake) {
    case 0:  // none
      store_shared(shared_floats() + thread, 1.0f);
      sync_block();
      store_global(m.data + thread, load_shared<float>(shared_floats() + other));
      return;
    case 1:
      return store_global(m.data + thread + 1, 1.0f);
    case 2:
      return store_shared(shared_floats() + thread + 1, 1.0f);
    case 3:
      store_global(reinterpret_cast<SixteenBytes*>(m.data + 1), SixteenBytes{});
      return;
    case 4:
      if (thread != 5) sync_block();
      return;
    case 5:
      if (thread != 5) shuffle_xor(1.0f, 1);
      return;
    case 6:
      thread == 5 ? (void)ballot(true) : (void)shuffle_xor(1.0f, 1);
      return;
    case 7:  // what the other warp writes is read without a barrier
      store_shared(shared_floats() + thread, 1.0f);
      store_global(m.data + thread, load_shared<float>(shared_floats() + other));
      return;
    case 8:  // what is still on its way is read
      copy_async<4>(shared_floats() + thread, m.data + thread, true);
      commit_copies();
      store_global(m.data + thread, load_shared<float>(shared_floats() + thread));
      return;
    default:  // what nobody wrote is read
      store_global(m.data + thread, load_shared<float>(shared_floats() + thread));
  }
}

std::string run_mistaken(const at::Tensor& data, int64_t mistake, int64_t blocks) {
  host::forbid_all();
  host::allow(data.data_ptr(), data.nbytes());
  const char* error =
      launch(&mistaken, blocks, 64, 64 * sizeof(float), nullptr, Memory{data.data_ptr<float>(), mistake});
  return error ? error : "";
}

}  // namespace
}  // namespace ear_ops::cuda

TORCH_LIBRARY_FRAGMENT(ear_ops_cuda_on_host, m) {
  m.def("configure(int seed, int shared_limit, bool hopper) -> ()",
        [](int64_t seed, int64_t shared_limit, bool hopper) {
          ear_ops::cuda::host::set_hopper(hopper);
          ear_ops::cuda::host::set_seed(static_cast<uint64_t>(seed));
          ear_ops::cuda::host::set_shared_limit(shared_limit);
        });
  m.def("set_device(int function) -> ()", [](int64_t function) {
    ear_ops::cuda::host::set_device(reinterpret_cast<ear_ops::cuda::host::Device>(function));
  });
  m.def("memory() -> int[]", []() {  // address, bytes and writes, of everything that kernels may touch
    std::vector<int64_t> numbers;
    for (const auto& of : ear_ops::cuda::host::memory())
      numbers.insert(numbers.end(), {reinterpret_cast<int64_t>(of.data), of.bytes, of.writes});
    return numbers;
  });
  m.def("run_mistaken(Tensor(a!) data, int mistake, int blocks=1) -> str", &ear_ops::cuda::run_mistaken);
}
