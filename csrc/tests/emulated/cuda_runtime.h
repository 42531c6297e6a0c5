#pragma once
// Stands in for CUDA's runtime on the host: it refuses the launches that a GPU would refuse,
// records all others, and runs them under csrc/tests/cuda_emulation.h. A test sets the device's
// properties, and which call fails.
#include <cstdint>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "csrc/cuda/primitives.cuh"  // with csrc/tests/cuda_emulation.h

enum cudaError_t {
  cudaSuccess,
  cudaErrorInvalidValue,
  cudaErrorInvalidConfiguration,
  cudaErrorInvalidClusterSize,
  cudaErrorUnknown,
};
using cudaStream_t = struct CUstream_st*;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

enum cudaDeviceAttr {
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrReservedSharedMemoryPerBlock,
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributePreferredSharedMemoryCarveout,
  cudaFuncAttributeNonPortableClusterSizeAllowed,
};
enum { cudaSharedmemCarveoutMaxShared = 100 };
struct cudaFuncAttributes {
  int ptxVersion;
};

enum cudaLaunchAttributeID { cudaLaunchAttributeNone, cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttributeValue {
  struct {
    unsigned x, y, z;
  } clusterDim;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace spo::emulation {

// What a kernel was allowed.
struct Allowed {
  int64_t shared_bytes = 48 << 10, carveout = -1;
  bool non_portable_cluster = false;
};

struct Launch {
  const void* kernel;
  unsigned blocks, threads;
  int64_t shared_bytes;
  int cluster;
  cudaStream_t stream;
  Allowed allowed;  // when it was launched
};

struct Runtime {
  // The device, set by a test: an H100 unless it says otherwise.
  int64_t shared_per_multiprocessor = 228 << 10;
  int64_t shared_per_block = -1;  // -1: all but the reserved
  bool clusters = true;           // whether the kernels were compiled with them
  int largest_cluster = 16;
  bool runs = true;     // or only records
  std::string failing;  // the call that fails
  std::map<const void*, Allowed> allowed;
  std::vector<Launch> launches;
  std::vector<cudaStream_t> memsets, sorts;
  cudaError_t last_error = cudaSuccess;

  int64_t block_limit() const {
    return shared_per_block < 0 ? shared_per_multiprocessor - 1024 : shared_per_block;
  }
};

inline Runtime runtime;

inline cudaError_t note(cudaError_t error) {
  if (error != cudaSuccess) runtime.last_error = error;
  return error;
}

inline cudaError_t called(const char* name) {
  return note(runtime.failing == name ? cudaErrorUnknown : cudaSuccess);
}

inline int cluster_of(const cudaLaunchConfig_t& config) {
  int cluster = 1;
  for (unsigned i = 0; i < config.numAttrs; ++i)
    if (config.attrs[i].id == cudaLaunchAttributeClusterDimension)
      cluster = static_cast<int>(config.attrs[i].val.clusterDim.x);
  return cluster;
}

// Why the device refuses a launch.
inline cudaError_t refusal(const cudaLaunchConfig_t& config, const Allowed& allowed) {
  const unsigned threads = config.blockDim.x;
  const int cluster = cluster_of(config);
  if (config.dynamicSmemBytes > static_cast<size_t>(allowed.shared_bytes))
    return cudaErrorInvalidValue;
  if (threads == 0 || threads > 1024 || config.gridDim.x == 0 || config.gridDim.x >> 31)
    return cudaErrorInvalidConfiguration;
  if (cluster == 1) return cudaSuccess;
  if (!runtime.clusters || cluster < 1 || cluster > runtime.largest_cluster ||
      (cluster > 8 && !allowed.non_portable_cluster))
    return cudaErrorInvalidClusterSize;
  return config.gridDim.x % cluster ? cudaErrorInvalidConfiguration : cudaSuccess;
}

}  // namespace spo::emulation

inline cudaError_t cudaGetLastError() {
  const cudaError_t error = spo::emulation::runtime.last_error;
  spo::emulation::runtime.last_error = cudaSuccess;
  return error;
}
inline const char* cudaGetErrorString(cudaError_t) { return "the emulation's error"; }

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return spo::emulation::called("cudaGetDevice");
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const spo::emulation::Runtime& device = spo::emulation::runtime;
  *value = static_cast<int>(
      attribute == cudaDevAttrMaxSharedMemoryPerMultiprocessor ? device.shared_per_multiprocessor
      : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin   ? device.block_limit()
                                                               : 1024);
  return spo::emulation::called("cudaDeviceGetAttribute");
}

template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel) {
  attributes->ptxVersion = spo::emulation::runtime.clusters ? 90 : 80;
  return spo::emulation::called("cudaFuncGetAttributes");
}

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel kernel, cudaFuncAttribute attribute, int value) {
  spo::emulation::Runtime& device = spo::emulation::runtime;
  spo::emulation::Allowed& allowed = device.allowed[reinterpret_cast<const void*>(kernel)];
  if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed) {
    if (!device.clusters) return spo::emulation::note(cudaErrorInvalidValue);
    allowed.non_portable_cluster = value != 0;
  } else if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) {
    allowed.carveout = value;
  } else {
    if (value < 0 || value > device.block_limit())
      return spo::emulation::note(cudaErrorInvalidValue);
    allowed.shared_bytes = value;
  }
  return spo::emulation::called("cudaFuncSetAttribute");
}

template <class Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, Kernel kernel,
                                           const cudaLaunchConfig_t* config) {
  spo::emulation::Runtime& device = spo::emulation::runtime;
  const spo::emulation::Allowed& allowed = device.allowed[reinterpret_cast<const void*>(kernel)];
  *clusters = 1;
  if (const cudaError_t error = spo::emulation::refusal(*config, allowed))
    return spo::emulation::note(error);
  return spo::emulation::called("cudaOccupancyMaxActiveClusters");
}

template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               const Args&... args) {
  spo::emulation::Runtime& device = spo::emulation::runtime;
  const void* const key = reinterpret_cast<const void*>(kernel);
  const spo::emulation::Allowed& allowed = device.allowed[key];
  if (const cudaError_t error = spo::emulation::refusal(*config, allowed))
    return spo::emulation::note(error);
  const int cluster = spo::emulation::cluster_of(*config);
  const auto shared_bytes = static_cast<int64_t>(config->dynamicSmemBytes);
  device.launches.push_back(
      {key, config->gridDim.x, config->blockDim.x, shared_bytes, cluster, config->stream, allowed});
  if (device.runs) {
    spo::emulation::machine.kernel = [&] { kernel(args...); };
    spo::emulation::run_grid(config->gridDim.x, cluster, static_cast<int>(config->blockDim.x),
                             shared_bytes);
  }
  return spo::emulation::called("cudaLaunchKernelEx");
}

inline cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t stream) {
  spo::emulation::runtime.memsets.push_back(stream);
  if (bytes > 0 && spo::emulation::runtime.runs) std::memset(data, value, bytes);
  return spo::emulation::called("cudaMemsetAsync");
}
