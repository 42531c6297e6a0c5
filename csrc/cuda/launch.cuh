#pragma once
// Host side of the kernels: launches, workspace, errors. The emulation has its own copy of these
// names, so that launchers too run under it.
#include "csrc/cuda/primitives.cuh"

#ifndef SPO_CUDA_EMULATION
#include <stdexcept>
#include <string>

namespace spo {

inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("CUDA: ") + what + ": " + cudaGetErrorString(error));
}

// What decides how many blocks share a multiprocessor.
struct SharedMemory {
  int64_t per_multiprocessor, per_block, reserved_per_block;
};

inline SharedMemory shared_memory() {
  int device, sm, block, reserved;
  check_cuda(cudaGetDevice(&device), "no current device");
  const auto get = [&](int* value, cudaDeviceAttr attribute) {
    check_cuda(cudaDeviceGetAttribute(value, attribute, device), "device attribute");
  };
  get(&sm, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  get(&block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  get(&reserved, cudaDevAttrReservedSharedMemoryPerBlock);
  return {sm, block, reserved};
}

// Whether the code of `kernel` that this device loads was compiled with clusters. The device's own
// capability does not tell: newer ones may run the code made for sm_80.
template <class... Params>
bool has_clusters(void (*kernel)(Params...)) {
  cudaFuncAttributes attributes;
  check_cuda(cudaFuncGetAttributes(&attributes, kernel), "kernel attributes");
  return attributes.ptxVersion >= 90;
}

struct LaunchShape {
  int64_t blocks = 0;
  int threads = 0;
  int64_t shared_bytes = 0;
  int cluster = 1;
};

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), const LaunchShape& shape, void* stream,
            const Args&... args) {
  if (shape.blocks == 0) return;
  if (shape.shared_bytes > 48 << 10) {
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(shape.shared_bytes)),
               "shared memory of a block");
    // Otherwise the driver may give the L1 cache what a third block needs.
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                    cudaSharedmemCarveoutMaxShared),
               "shared memory carveout");
  }
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(shape.blocks));
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = shape.cluster > 1 ? 1 : 0;
  check_cuda(cudaLaunchKernelEx(&config, kernel, args...), "kernel launch");
}

// Device memory in stream order; reused from the pool of the device.
template <class T>
class Workspace {
 public:
  Workspace(int64_t count, void* stream) : stream_(static_cast<cudaStream_t>(stream)) {
    check_cuda(cudaMallocAsync(reinterpret_cast<void**>(&data_), count * sizeof(T), stream_),
               "workspace");
  }
  ~Workspace() { cudaFreeAsync(data_, stream_); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  T* get() const { return data_; }
  void clear(int64_t count) {
    check_cuda(cudaMemsetAsync(data_, 0, count * sizeof(T), stream_), "workspace");
  }

 private:
  T* data_ = nullptr;
  cudaStream_t stream_;
};

// A value on the device once everything before it on the stream is done.
template <class T>
T read_back(const T* device_value, void* stream) {
  T value;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  check_cuda(cudaMemcpyAsync(&value, device_value, sizeof(T), cudaMemcpyDeviceToHost, cuda_stream),
             "copy of a result");
  check_cuda(cudaStreamSynchronize(cuda_stream), "kernel");
  return value;
}

}  // namespace spo
#endif

namespace spo {

__host__ __device__ inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

__device__ __forceinline__ int64_t thread_item() {
  return blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
}

// The kernels of one op over offsets or parents, which may be malformed. Every kernel has one more
// argument, the last: a flag that is 0 until a kernel finds an error. The kernels after the check
// then do nothing, since a bad offset points outside the buffers.
class CheckedLaunch {
 public:
  explicit CheckedLaunch(void* stream) : stream_(stream), malformed_(1, stream) {
    malformed_.clear(1);
  }

  template <class Kernel, class... Args>
  void blocks(Kernel kernel, const LaunchShape& shape, const Args&... args) const {
    launch(kernel, shape, stream_, args..., malformed_.get());
  }

  // One thread for each item, for kernels whose threads work alone.
  template <class Kernel, class... Args>
  void threads(Kernel kernel, int64_t items, const Args&... args) const {
    constexpr int kThreads = 256;
    blocks(kernel, {ceil_div(items, kThreads), kThreads}, args...);
  }

  void* stream() const { return stream_; }

  // Waits for the stream.
  bool is_well_formed() const { return read_back(malformed_.get(), stream_) == 0; }

 private:
  void* stream_;
  Workspace<int32_t> malformed_;
};

}  // namespace spo
