#pragma once
// What the kernels of matmul_fixed_cpu share: its launcher cuts the work into blocks.
#include <cstdint>

namespace spo {

constexpr int64_t kFixedDepth = 256;                // terms that are summed in registers
constexpr int64_t kFixedWidth = 256;                // columns of a block of B: 256 KiB
constexpr int64_t kFixedStride = kFixedDepth + 16;  // of a widened row; other lines of the cache
constexpr int64_t kFixedMostRows = 14;
constexpr int64_t kFixedRoom =
    kFixedDepth * kFixedWidth + kFixedMostRows * (kFixedStride + kFixedWidth);  // floats

}  // namespace spo
