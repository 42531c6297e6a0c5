#pragma once
// Stands in for cub's sort by key on the host.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <vector>

namespace cub {

struct DeviceRadixSort {
  // Stable, by the bits [begin_bit, end_bit) of the keys. Without a workspace it sets `bytes`.
  template <class Key, class Value>
  static cudaError_t SortPairs(void* workspace, size_t& bytes, const Key* keys_in, Key* keys_out,
                               const Value* values_in, Value* values_out, int count, int begin_bit,
                               int end_bit, cudaStream_t stream) {
    const size_t needed = 8 * static_cast<size_t>(count) + 1;
    if (!workspace) {
      bytes = needed;
      return cudaSuccess;
    }
    if (bytes < needed || reinterpret_cast<uintptr_t>(workspace) % 256)
      return spo::emulation::note(cudaErrorInvalidValue);
    spo::emulation::runtime.sorts.push_back(stream);
    if (!spo::emulation::runtime.runs) return spo::emulation::called("SortPairs");
    std::memset(workspace, 0xff, bytes);
    const auto digits = [&](int i) {
      return static_cast<uint64_t>(keys_in[i]) >> begin_bit &
             ((uint64_t{1} << (end_bit - begin_bit)) - 1);
    };
    std::vector<int> order(count);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int a, int b) { return digits(a) < digits(b); });
    for (int i = 0; i < count; ++i)
      keys_out[i] = keys_in[order[i]], values_out[i] = values_in[order[i]];
    return cudaSuccess;
  }
};

}  // namespace cub
