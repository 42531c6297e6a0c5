#pragma once
// Offsets of packed sequences, such as cu_seqlens, checked on the device.
#include "csrc/cuda/launch.cuh"

namespace spo {

// Malformed unless offsets (count + 1,) start at 0, end at `total` and never decrease.
static __global__ void check_each_offset(const int64_t* offsets, int64_t count, int64_t total,
                                         int64_t* result) {
  const int64_t i = thread_item();
  if (i > count) return;
  const bool good = i == 0 ? offsets[0] == 0 : offsets[i - 1] <= offsets[i];
  if (!good || (i == count && offsets[i] != total)) *result = kMalformed;
}

inline void check_offsets(const CheckedLaunch& run, const int64_t* offsets, int64_t count,
                          int64_t total) {
  run.threads(check_each_offset, count + 1, offsets, count, total);
}

}  // namespace spo
