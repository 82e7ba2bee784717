// Where a call runs: the device and stream of its tensors, and memory that its kernels may touch. This is the only host
// code that differs where tests compile the kernels for the host (EAR_OPS_CUDA_ON_HOST). The operators are registered
// as EAR_OPS_LIBRARY for kDispatchKey.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <c10/util/Exception.h>

#if defined(EAR_OPS_CUDA_ON_HOST)

#include "host.h"

#define EAR_OPS_LIBRARY ear_ops_cuda_on_host

namespace ear_ops::cuda {

constexpr c10::DispatchKey kDispatchKey = c10::DispatchKey::CPU;

inline void* begin_call(c10::Device) {  // the kernels of a call touch the memory of its tensors alone
  host::forbid_all();
  return nullptr;
}
inline void allow(const void* data, int64_t bytes) { host::allow(data, bytes); }
inline void spoil(void* data, int64_t bytes) { host::spoil(data, bytes); }
inline void spoil_scratch(void* data, int64_t bytes) { host::spoil_scratch(data, bytes); }

}  // namespace ear_ops::cuda

#else

#include <c10/core/impl/VirtualGuardImpl.h>

#define EAR_OPS_LIBRARY ear_ops

namespace ear_ops::cuda {

constexpr c10::DispatchKey kDispatchKey = c10::DispatchKey::CUDA;

inline void* begin_call(c10::Device device) {  // the current stream
  return c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle();
}
inline void allow(const void*, int64_t) {}
inline void spoil(void*, int64_t) {}
inline void spoil_scratch(void*, int64_t) {}

}  // namespace ear_ops::cuda

#endif

namespace ear_ops::cuda {

// Makes the tensors' device current and finds its current stream. Made before any memory of the call is asked for.
class Launch {
 public:
  explicit Launch(const at::Tensor& tensor) : guard_(tensor.device()), stream_(begin_call(tensor.device())) {}
  void* stream() const { return stream_; }
  void check(const char* op, const char* error) const {
    TORCH_CHECK(!error, op, ": the kernel did not start: ", error);
  }

 private:
  c10::DeviceGuard guard_;
  void* stream_;
};

// The memory of a tensor, which the kernels of this call may touch.
inline char* memory_of(const at::Tensor& tensor) {
  char* data = static_cast<char*>(tensor.data_ptr());
  int64_t last = 0;
  for (int64_t i = 0; i < tensor.dim(); ++i) last += (tensor.size(i) - 1) * tensor.stride(i);
  if (tensor.numel() > 0) allow(data, (last + 1) * tensor.element_size());
  return data;
}

// Memory for a result, every element of which a kernel writes.
inline at::Tensor make(at::IntArrayRef shape, const at::TensorOptions& options) {
  at::Tensor tensor = at::empty(shape, options);
  if (tensor.numel() > 0) spoil(tensor.data_ptr(), tensor.nbytes());
  return tensor;
}

// Memory between the kernels of a call. Each of them may write an element once.
inline at::Tensor make_scratch(at::IntArrayRef shape, const at::TensorOptions& options) {
  at::Tensor tensor = at::empty(shape, options);
  if (tensor.numel() > 0) spoil_scratch(tensor.data_ptr(), tensor.nbytes());
  return tensor;
}

}  // namespace ear_ops::cuda
