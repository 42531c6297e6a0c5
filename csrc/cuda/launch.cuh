#pragma once
// Host side of the kernels: launches, workspaces, errors. Nothing here waits for the device.
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "csrc/cuda/primitives.cuh"

namespace spo {

inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  // Otherwise the next check of the last error, by PyTorch for example, would report it again.
  cudaGetLastError();
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

constexpr int kPortableCluster = 8;  // every device with clusters has them up to this size
constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;

struct LaunchShape {
  int64_t blocks = 0;
  int threads = 0;
  int64_t shared_bytes = 0;
  int cluster = 1;
};

// What cudaLaunchKernelEx takes; it points into itself.
struct LaunchConfig {
  cudaLaunchAttribute cluster = {};
  cudaLaunchConfig_t config = {};

  LaunchConfig(const LaunchShape& shape, void* stream) {
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
    config.gridDim = dim3(static_cast<unsigned>(shape.blocks));
    config.blockDim = dim3(shape.threads);
    config.dynamicSmemBytes = shape.shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &cluster;
    config.numAttrs = shape.cluster > 1 ? 1 : 0;
  }
  LaunchConfig(const LaunchConfig&) = delete;
  LaunchConfig& operator=(const LaunchConfig&) = delete;
};

// Sets what a kernel must be allowed before it can run in a shape.
template <class... Params>
cudaError_t allow_shape(void (*kernel)(Params...), const LaunchShape& shape) {
  cudaError_t error = cudaSuccess;
  if (shape.cluster > kPortableCluster)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (error != cudaSuccess || shape.shared_bytes <= 48 << 10) return error;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shape.shared_bytes));
  if (error != cudaSuccess) return error;
  // Otherwise the driver may give the L1 cache what a third block needs.
  return cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                              cudaSharedmemCarveoutMaxShared);
}

// Whether the device has room for one cluster of this shape, which may be larger than is portable.
template <class... Params>
bool has_room(void (*kernel)(Params...), const LaunchShape& shape) {
  int clusters = 0;
  const LaunchConfig asked(shape, nullptr);
  cudaError_t error = allow_shape(kernel, shape);
  if (error == cudaSuccess)
    error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &asked.config);
  if (error != cudaSuccess) cudaGetLastError();  // clears it: it is an answer here
  return error == cudaSuccess && clusters > 0;
}

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), const LaunchShape& shape, void* stream,
            const Args&... args) {
  if (shape.blocks == 0) return;
  if (shape.blocks > kMaxBlocks)
    throw std::runtime_error("CUDA: expected work for at most " + std::to_string(kMaxBlocks) +
                             " blocks, found " + std::to_string(shape.blocks) +
                             ": pass fewer rows in a call");
  check_cuda(allow_shape(kernel, shape), "shape of a block");
  const LaunchConfig launched(shape, stream);
  check_cuda(cudaLaunchKernelEx(&launched.config, kernel, args...), "kernel launch");
}

__host__ __device__ inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

__device__ __forceinline__ int64_t thread_item() {
  return blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
}

// Cuts a workspace into aligned pieces. Without a workspace it counts their bytes.
class Pieces {
 public:
  explicit Pieces(void* workspace) : begin_(reinterpret_cast<uintptr_t>(workspace)) {}

  template <class T>
  T* take(int64_t count) {
    constexpr int64_t kAlignment = 256;  // of an allocation, and what the sort asks for
    T* piece = reinterpret_cast<T*>(begin_ + bytes_);
    bytes_ += ceil_div(count * static_cast<int64_t>(sizeof(T)), kAlignment) * kAlignment;
    return piece;
  }

  int64_t bytes() const { return bytes_; }

 private:
  uintptr_t begin_;
  int64_t bytes_ = 0;
};

// The result of a launch when its input is malformed; it starts as 0.
constexpr int64_t kMalformed = -1;

// The kernels of one op over offsets or parents, which may be malformed. Every kernel has one more
// argument, the last: the result, which becomes kMalformed when a kernel finds an error. The
// kernels after the check then write NaN or nothing, since a bad offset points outside the buffers.
class CheckedLaunch {
 public:
  // The result lies at the start of the workspace, of which the first `zeroed` bytes become 0.
  CheckedLaunch(void* workspace, int64_t zeroed, void* stream)
      : result_(static_cast<int64_t*>(workspace)), stream_(stream) {
    check_cuda(cudaMemsetAsync(workspace, 0, zeroed, static_cast<cudaStream_t>(stream)),
               "clearing of the workspace");
  }

  template <class Kernel, class... Args>
  void blocks(Kernel kernel, const LaunchShape& shape, const Args&... args) const {
    launch(kernel, shape, stream_, args..., result_);
  }

  // One thread for each item, for kernels whose threads work alone.
  template <class Kernel, class... Args>
  void threads(Kernel kernel, int64_t items, const Args&... args) const {
    constexpr int kThreads = 256;
    blocks(kernel, {ceil_div(items, kThreads), kThreads}, args...);
  }

 private:
  int64_t* result_;
  void* stream_;
};

}  // namespace spo
