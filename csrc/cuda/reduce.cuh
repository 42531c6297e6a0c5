#pragma once
// Reductions and prefix sums over the threads of a block. Fixed order, so results are the same on
// every run.
#include <cfloat>

#include "csrc/cuda/primitives.cuh"

namespace spo {

constexpr int kWarp = 32;
constexpr int kMaxWarps = 32;

// Sums over some logits x_j of a row, in powers of two: d_j = (x_j - max) log2(e) / temperature.
struct Partial {
  float max;       // of the logits or their tanh; the lowest float, not -inf, where there are none
  float sum;       // of 2^d
  float weighted;  // of 2^d d; meaningless unless asked for
};

constexpr float kWeightFloor = -200;  // 2^kWeightFloor is 0, so that 0 * -inf never happens

__device__ __forceinline__ Partial empty_partial() { return {-FLT_MAX, 0, 0}; }

// Moves the sums to a larger maximum. The maximum ignores NaN; the sum keeps it.
__device__ __forceinline__ void raise_max(Partial* p, float max, float scale) {
  const float delta = (p->max - max) * scale;
  const float factor = exp2_approx(delta);
  p->weighted = factor * (p->weighted + fmaxf(delta, kWeightFloor) * p->sum);
  p->sum *= factor;
  p->max = max;
}

__device__ __forceinline__ Partial combine(Partial a, Partial b, float scale) {
  const float max = fmaxf(a.max, b.max);
  raise_max(&a, max, scale);
  raise_max(&b, max, scale);
  return {max, a.sum + b.sum, a.weighted + b.weighted};
}

// The warp's total, in its first lane.
__device__ __forceinline__ Partial reduce_warp(Partial p, float scale) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    const Partial other = {shuffle_xor(p.max, mask), shuffle_xor(p.sum, mask),
                           shuffle_xor(p.weighted, mask)};
    p = combine(p, other, scale);
  }
  return p;
}

// The block's total, in thread 0. `warps` is shared memory for one Partial per warp.
__device__ __forceinline__ Partial reduce_block(Partial p, float scale, Partial* warps) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  p = reduce_warp(p, scale);
  if (lane == 0) warps[warp] = p;
  sync_block();
  if (warp == 0) {
    p = lane < static_cast<int>(blockDim.x) / kWarp ? warps[lane] : empty_partial();
    p = reduce_warp(p, scale);
  }
  return p;
}

// Sum of `value` over the threads before this one; `total` becomes the sum over all. `warps` is
// shared memory for one value per warp; the call ends with a barrier, so it can be used again.
template <class T>
__device__ __forceinline__ T prefix_sum(T value, T* warps, T* total) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  T inclusive = value;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const T before = shuffle_up(inclusive, step);
    if (lane >= step) inclusive += before;
  }
  if (lane == kWarp - 1) warps[warp] = inclusive;
  sync_block();
  T offset = 0, sum = 0;
  for (int w = 0; w < static_cast<int>(blockDim.x) / kWarp; ++w) {
    if (w == warp) offset = sum;
    sum += warps[w];
  }
  sync_block();
  *total = sum;
  return offset + inclusive - value;
}

}  // namespace spo
