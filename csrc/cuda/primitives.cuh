#pragma once
// The hardware operations that the kernels use, one thin function each, so that the same kernel
// source also runs on the host under the emulation of csrc/tests/cuda_emulation.h.
#include <cstdint>

namespace spo {

// The largest unit of one load or store.
struct alignas(16) Granule {
  uint32_t words[4];
};

}  // namespace spo

#ifdef SPO_CUDA_EMULATION
#include "csrc/tests/cuda_emulation.h"
#else
#include <cuda_runtime.h>

namespace spo {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kHasClusters = false;  // kernels that need them are compiled empty
#else
constexpr bool kHasClusters = true;
#endif

constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// The block's dynamic shared memory, 16-byte aligned; kernels have no other.
__device__ __forceinline__ unsigned char* block_memory() {
  extern __shared__ __align__(16) unsigned char dynamic_memory[];
  return dynamic_memory;
}

__device__ __forceinline__ void sync_block() { __syncthreads(); }

template <class T>
__device__ __forceinline__ T shuffle(T value, int lane) {
  return __shfl_sync(kAllLanes, value, lane);
}
template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(kAllLanes, value, mask);
}
template <class T>
__device__ __forceinline__ T shuffle_up(T value, int lanes) {
  return __shfl_up_sync(kAllLanes, value, lanes);
}

// Keeps the compiler from moving the load of x behind a branch that may not need it.
__device__ __forceinline__ void load_now(float& x) { asm volatile("" : "+f"(x)); }
__device__ __forceinline__ void load_now(int64_t& x) { asm volatile("" : "+l"(x)); }

// 2^x within 2 ulp; results below 2^-126 are 0, NaN stays NaN.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x within 1 ulp.
__device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The larger halves of two pairs; a NaN loses.
__device__ __forceinline__ uint32_t max_bfloat16(uint32_t a, uint32_t b) {
  uint32_t larger;
  asm("max.bf16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
  return larger;
}
__device__ __forceinline__ uint32_t max_float16(uint32_t a, uint32_t b) {
  uint32_t larger;
  asm("max.f16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
  return larger;
}

__device__ __forceinline__ float half_to_float(uint16_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}

// Two floats rounded to nearest even, the first in the low half.
__device__ __forceinline__ uint32_t pack_bfloat16(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
__device__ __forceinline__ uint32_t pack_float16(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

__device__ __forceinline__ int cluster_rank() {
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ int cluster_size() {
  int size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}

// Barrier of all threads of the cluster, in two halves. It orders no memory accesses: it only says
// that every block runs and has initialised its landings.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait;" ::: "memory");
}

// A barrier in shared memory that opens once, when the bytes announced to it have arrived.
using Landing = uint64_t;

__device__ __forceinline__ void init_landings(Landing* landings, int count) {
  for (int i = 0; i < count; ++i)
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(landings + i))
                 : "memory");
  // Makes it visible to the copy engine and, after cluster_arrive, to other blocks.
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void expect_bytes(Landing* landing, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(landing)),
      "r"(bytes)
      : "memory");
}

// Copies global to shared memory in the background. Addresses and size are multiples of 16.
__device__ __forceinline__ void copy_async(void* to, const void* from, uint32_t bytes,
                                           Landing* landing) {
  expect_bytes(landing, bytes);
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(to)),
      "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(landing))
      : "memory");
}

// Stores to the same address in the shared memory of another block of the cluster, where it arrives
// like a copy. The other block must not end before it has waited for it.
__device__ __forceinline__ void send_to_rank(Granule* to, int rank, const Granule& value,
                                             Landing* landing) {
  asm volatile(
      "{\n"
      ".reg .u32 to, landing;\n"
      "mapa.shared::cluster.u32 to, %0, %2;\n"
      "mapa.shared::cluster.u32 landing, %1, %2;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [to], {%3, %4, %5, %6}, "
      "[landing];\n"
      "}\n" ::"r"(shared_address(to)),
      "r"(shared_address(landing)), "r"(rank), "r"(value.words[0]), "r"(value.words[1]),
      "r"(value.words[2]), "r"(value.words[3])
      : "memory");
}

// kSent: the bytes were sent by other blocks. Copies do not need that memory order.
template <bool kSent = false>
__device__ __forceinline__ void wait_landing(Landing* landing) {
  uint32_t landed = 0;
  while (!landed) {
    if constexpr (kSent) {
      asm volatile(
          "{\n"
          ".reg .pred p;\n"
          "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], 0;\n"
          "selp.u32 %0, 1, 0, p;\n"
          "}\n"
          : "=r"(landed)
          : "r"(shared_address(landing))
          : "memory");
    } else {
      asm volatile(
          "{\n"
          ".reg .pred p;\n"
          "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], 0;\n"
          "selp.u32 %0, 1, 0, p;\n"
          "}\n"
          : "=r"(landed)
          : "r"(shared_address(landing))
          : "memory");
    }
  }
}

}  // namespace spo
#endif
