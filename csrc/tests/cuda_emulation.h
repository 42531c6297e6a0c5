#pragma once
// Runs the CUDA kernels on the host: what csrc/cuda/primitives.cuh gives them on a GPU, over
// fibers; csrc/tests/emulated/cuda_runtime.h launches them. Every CUDA thread is a fiber. A fiber
// gives way only at a barrier, a shuffle, a fence or an atomic, so runs are deterministic. Meant to
// catch what a GPU would not forgive: shared memory starts as NaN, a background copy lands only
// when its barrier is waited for, misaligned copies and threads that miss a barrier abort, and
// fibers can run in either order or a random one, so that a missing barrier shows in at least one.
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#define SPO_ISA emulation
#include "csrc/cpu/vec.h"
#undef SPO_ISA

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

namespace spo {
namespace emulation {

struct Dim {
  int x = 0;
};

struct Block;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Block* block = nullptr;
  int thread = 0;
  bool done = true;
  int pause = 0;  // rounds that it waits; only in a random order
  uint64_t cluster_phase = 0;
};

// Counts arrivals; the generation grows when all have arrived.
struct Barrier {
  int expected = 0, arrived = 0;
  uint64_t generation = 0;

  bool arrive() {
    if (++arrived < expected) return false;
    arrived = 0;
    ++generation;
    return true;
  }
};

struct Warp {
  Barrier barrier;
  uint64_t values[2][32];  // of even and odd generations
};

struct Copy {
  void* to;
  const void* from;
  uint32_t bytes;
  uint64_t* landing;
};

struct Block {
  int index = 0, rank = 0;
  std::vector<unsigned char> memory;
  Barrier barrier;
  std::vector<Warp> warps;
  std::vector<Copy> copies;
};

struct Machine {
  // Set by a test. Several blocks run at the same time only in kernels without clusters.
  bool backwards = false, random_order = false;
  int resident_blocks = 1;
  // The cluster, or the blocks, under way.
  int cluster = 1;
  std::vector<Block> blocks;
  Barrier cluster_barrier;
  std::vector<Fiber> fibers;
  Fiber* current = nullptr;
  ucontext_t scheduler;
  std::function<void()> kernel;
  std::mt19937 random;
  int64_t idle = 0;  // times a fiber gave way since a barrier last opened
};

inline Machine machine;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "CUDA emulation: %s\n", what);
  std::abort();
}

inline void give_way() {
  if (++machine.idle > 1000000) fail("threads wait for a barrier that never opens");
  swapcontext(&machine.current->context, &machine.scheduler);
}

inline void wait_beyond(Barrier& barrier, uint64_t generation) {
  while (barrier.generation == generation) give_way();
}

inline void arrive(Barrier& barrier) {
  if (barrier.arrive()) machine.idle = 0;
}

inline void arrive_and_wait(Barrier& barrier) {
  const uint64_t generation = barrier.generation;
  arrive(barrier);
  wait_beyond(barrier, generation);
}

inline Block& block() { return *machine.current->block; }

inline void run_fiber() {
  machine.kernel();
  machine.current->done = true;
  swapcontext(&machine.current->context, &machine.scheduler);
}

}  // namespace emulation

// Names as in CUDA; set whenever a fiber goes on.
inline emulation::Dim threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

// Small, as ASan clears its notes on a whole stack at every switch.
constexpr size_t kStack = 32 << 10;
constexpr char kStackEnd[] = "the end of the stack";

inline void start(Fiber& fiber, Block& block, int thread) {
  if (!fiber.stack) fiber.stack.reset(new char[kStack]);
  std::memcpy(fiber.stack.get(), kStackEnd, sizeof kStackEnd);
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, run_fiber, 0);
  fiber.block = &block, fiber.thread = thread, fiber.done = false, fiber.pause = 0;
}

// Runs blocks side by side: those of one cluster, or some without clusters.
inline void run_blocks(int first_block, int blocks, int threads, int64_t shared_bytes) {
  const int count = blocks * threads;
  machine.blocks.assign(blocks, {});
  machine.cluster_barrier = {count, 0, 0};
  if (machine.fibers.size() < static_cast<size_t>(count)) machine.fibers.resize(count);
  for (int i = 0; i < blocks; ++i) {
    Block& b = machine.blocks[i];
    b.index = first_block + i, b.rank = i % machine.cluster;
    b.memory.assign(shared_bytes, 0xff);
    b.barrier.expected = threads;
    b.warps.resize(threads / 32);
    for (Warp& warp : b.warps) warp.barrier.expected = 32;
    for (int thread = 0; thread < threads; ++thread)
      start(machine.fibers[i * threads + thread], b, thread);
  }
  machine.idle = 0;
  std::vector<int> order(count);
  for (int i = 0; i < count; ++i) order[i] = machine.backwards ? count - 1 - i : i;
  for (int left = count; left > 0;) {
    if (machine.random_order) std::shuffle(order.begin(), order.end(), machine.random);
    for (int i : order) {
      Fiber& fiber = machine.fibers[i];
      if (fiber.done) continue;
      if (machine.random_order && --fiber.pause > 0) continue;
      if (machine.random_order && machine.random() % 8 == 0) fiber.pause = machine.random() % 32;
      machine.current = &fiber;
      threadIdx.x = fiber.thread, blockIdx.x = fiber.block->index;
      swapcontext(&machine.scheduler, &fiber.context);
      if (std::memcmp(fiber.stack.get(), kStackEnd, sizeof kStackEnd)) fail("a stack is too small");
      left -= fiber.done;
    }
  }
}

// What a shuffle gives lane `lane` of the calling warp.
template <class T>
T exchange(T value, int lane) {
  Warp& warp = block().warps[threadIdx.x / 32];
  const uint64_t generation = warp.barrier.generation;
  uint64_t(&values)[32] = warp.values[generation % 2];
  std::memcpy(&values[threadIdx.x % 32], &value, sizeof value);
  arrive_and_wait(warp.barrier);
  if (lane >= 0 && lane < 32) std::memcpy(&value, &values[lane], sizeof value);
  return value;
}

// All blocks of a grid, some at a time, from either end.
inline void run_grid(int64_t blocks, int cluster, int threads, int64_t shared_bytes) {
  machine.cluster = cluster;
  blockDim.x = threads, gridDim.x = static_cast<int>(blocks);
  const int64_t step = cluster > 1 ? cluster : machine.resident_blocks;
  const int64_t steps = (blocks + step - 1) / step;
  for (int64_t i = 0; i < steps; ++i) {
    const int64_t first = (machine.backwards ? steps - 1 - i : i) * step;
    run_blocks(static_cast<int>(first), static_cast<int>(std::min(step, blocks - first)), threads,
               shared_bytes);
  }
}

}  // namespace emulation

// primitives.cuh
constexpr bool kHasClusters = true;

inline unsigned char* block_memory() { return emulation::block().memory.data(); }
inline void sync_block() { emulation::arrive_and_wait(emulation::block().barrier); }
template <class T>
T shuffle(T value, int lane) {
  return emulation::exchange(value, lane);
}
template <class T>
T shuffle_xor(T value, int mask) {
  return emulation::exchange(value, (threadIdx.x % 32) ^ mask);
}
template <class T>
T shuffle_up(T value, int lanes) {
  return emulation::exchange(value, threadIdx.x % 32 - lanes);
}

template <class T>
void load_now(T&) {}
inline float exp2_approx(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0 : y;
}
inline float reciprocal_approx(float x) { return 1 / x; }

template <class T>
uint32_t max_halves(uint32_t a, uint32_t b) {
  uint32_t larger = 0;
  for (int shift : {0, 16}) {
    const T x{static_cast<uint16_t>(a >> shift)}, y{static_cast<uint16_t>(b >> shift)};
    const float fx = emulation::to_float(x), fy = emulation::to_float(y);
    larger |= uint32_t{std::fmax(fx, fy) == fx ? x.bits : y.bits} << shift;
  }
  return larger;
}
inline uint32_t max_bfloat16(uint32_t a, uint32_t b) {
  return max_halves<emulation::BFloat16>(a, b);
}
inline uint32_t max_float16(uint32_t a, uint32_t b) { return max_halves<emulation::Float16>(a, b); }

inline float half_to_float(uint16_t bits) { return emulation::to_float(emulation::Float16{bits}); }
template <class T>
uint32_t pack_halves(float low, float high) {
  T pair[2];
  emulation::from_float(low, pair);
  emulation::from_float(high, pair + 1);
  return pair[0].bits | uint32_t{pair[1].bits} << 16;
}
inline uint32_t pack_bfloat16(float low, float high) {
  return pack_halves<emulation::BFloat16>(low, high);
}
inline uint32_t pack_float16(float low, float high) {
  return pack_halves<emulation::Float16>(low, high);
}

inline int cluster_rank() { return emulation::block().rank; }
inline int cluster_size() { return emulation::machine.cluster; }
inline void cluster_arrive() {
  if (emulation::machine.resident_blocks > 1) emulation::fail("blocks side by side in a cluster");
  emulation::machine.current->cluster_phase = emulation::machine.cluster_barrier.generation;
  emulation::arrive(emulation::machine.cluster_barrier);
}
inline void cluster_wait() {
  emulation::wait_beyond(emulation::machine.cluster_barrier,
                         emulation::machine.current->cluster_phase);
}

// A landing holds the bytes that are still to come; only a copy's arrive when they are waited for.
using Landing = uint64_t;

inline void init_landings(Landing* landings, int count) { std::memset(landings, 0, 8 * count); }
inline void expect_bytes(Landing* landing, uint32_t bytes) {
  if (*landing != 0) emulation::fail("a landing that is not initialised, or used twice");
  *landing = bytes;
}
inline void copy_async(void* to, const void* from, uint32_t bytes, Landing* landing) {
  if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16 || bytes % 16)
    emulation::fail("a background copy is not aligned to 16 bytes");
  expect_bytes(landing, bytes);
  emulation::block().copies.push_back({to, from, bytes, landing});
}
inline void send_to_rank(Granule* to, int rank, const Granule& value, Landing* landing) {
  // An H100 calls it an illegal instruction: a grid without clusters has no shared::cluster stores.
  if (cluster_size() < 2) emulation::fail("a store to another block without a cluster");
  unsigned char* there = emulation::machine.blocks[rank].memory.data();
  const auto offset = [](void* p) { return static_cast<unsigned char*>(p) - block_memory(); };
  std::memcpy(there + offset(to), &value, sizeof value);
  Landing& remote = *reinterpret_cast<Landing*>(there + offset(landing));
  if (remote < sizeof value) emulation::fail("a store that no landing expects");
  remote -= sizeof value;
  emulation::machine.idle = 0;
}
template <bool kSent = false>
void wait_landing(Landing* landing) {
  for (emulation::Copy& copy : emulation::block().copies) {
    if (copy.landing != landing || copy.bytes == 0) continue;
    std::memcpy(copy.to, copy.from, copy.bytes);
    *landing -= copy.bytes;
    copy.bytes = 0;
  }
  while (*landing != 0) emulation::give_way();
}

// What tree.cu takes from CUDA itself. Other threads may run before each of them.
inline void __threadfence() { emulation::give_way(); }
inline int32_t atomicAdd(int32_t* counter, int32_t value) {
  emulation::machine.idle = 0;
  emulation::give_way();
  const int32_t before = *counter;
  *counter += value;
  return before;
}
template <class T>
T __ldcg(const T* p) {
  if (emulation::machine.random_order && emulation::machine.random() % 2 == 0)
    emulation::give_way();
  return *p;
}

}  // namespace spo
