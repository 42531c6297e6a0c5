#pragma once
// A logits row held in the shared memory of a thread-block cluster: it is read from memory once,
// however many sweeps there are.
//
// Every block of the cluster holds an equal share of the row's granules. One thread hands the share
// to the copy engine in pieces, and the first sweep starts on a piece as soon as it has arrived.
// The loose elements at the row's ends stay in registers of rank 0.
//
// Blocks that share a multiprocessor do not wait for each other, which keeps the bandwidth up:
// while one waits for its row to arrive, another computes or stores. plan_held_row takes the
// smallest cluster of which three blocks fit a multiprocessor: 3 x 76 KB on sm_90 and sm_100, which
// is a row of 151936 bf16 logits over 4 blocks, or of 151936 fp32 logits over 8. The copy engine
// then has a third of that, 76 KB, in flight at any time, where latency times bandwidth asks for
// about 30 KB. A row of 262144 fp32 logits would leave one block of 8 a multiprocessor, so it takes
// a cluster of 16 where the device has room for one.
#include "csrc/cuda/row.cuh"
#include "csrc/objective.h"

namespace spo {

constexpr int kMaxCluster = 16;
constexpr int kHeldThreads = 512;
constexpr int kHeldBlocks = 3;     // on one multiprocessor; bounds the registers of the kernel
constexpr int kPieceGranules = 2;  // of every thread
constexpr int kMaxPieces = 16;     // at most 228 KB / (512 x 2 x 16 bytes) = 14.25 are needed

// The objective's inputs of the row. One thread reads them while the logits are in flight: reading
// them after the sums would cost one more memory latency per row.
struct RowInputs {
  float logit, power;
  Token token;
};

// What the block keeps in shared memory before its granules.
struct alignas(16) HeldRowMemory {
  Granule ranks[kMaxCluster];  // a Partial each, and padding
  Partial warps[kHeldThreads / kWarp];
  RowInputs inputs;
  Gradient gradient;
  bool has_gradient;
  Landing exchange;
  Landing landings[kMaxPieces];

  __device__ Granule* granules() { return reinterpret_cast<Granule*>(this + 1); }
};

template <class T>
struct HeldRow {
  const T* row;
  int64_t size;
  Split split;
  int64_t begin;  // first granule of this block's share
  int count;      // granules in the share
  int loose;      // loose elements that this block handles

  __device__ HeldRow(const T* row, int64_t size)
      : row(row), size(size), split(split_row(row, size)) {
    const int64_t each = (split.granules + cluster_size() - 1) / cluster_size();
    begin = smaller(each * cluster_rank(), split.granules);
    count = static_cast<int>(smaller(each, split.granules - begin));
    loose = cluster_rank() == 0 ? split.loose() : 0;
  }

  __device__ int piece() const { return kPieceGranules * blockDim.x; }

  // For one thread: hands the share to the copy engine.
  __device__ void start_loading(HeldRowMemory& memory) const {
    const Granule* from = reinterpret_cast<const Granule*>(row + split.head) + begin;
    for (int first = 0, i = 0; first < count; first += piece(), ++i) {
      const uint32_t bytes = smaller(piece(), count - first) * sizeof(Granule);
      copy_async(memory.granules() + first, from + first, bytes, &memory.landings[i]);
    }
  }

  // This thread's loose element, if it has one.
  __device__ float loose_logit() const {
    const int thread = threadIdx.x;
    return thread < loose ? to_float(row[split.element(thread, size)]) : 0.0f;
  }

  // First sweep; this thread's part.
  template <bool kWeighted>
  __device__ Partial sums(HeldRowMemory& memory, float loose_logit, float scale) const {
    const int thread = threadIdx.x, threads = blockDim.x;
    Partial p = empty_partial();
    if (thread < loose) add_element<kWeighted>(loose_logit, scale, &p);
    for (int first = 0, i = 0; first < count; first += piece(), ++i) {
      wait_landing(&memory.landings[i]);
      Granule step[kPieceGranules];
#pragma unroll
      for (int k = 0; k < kPieceGranules; ++k) {
        const int g = first + k * threads + thread;
        step[k] = g < count ? memory.granules()[g] : padding<T>();
      }
      add_granules<kWeighted, T>(step, scale, &p);
    }
    return p;
  }

  // Second sweep.
  template <class U>
  __device__ void write(HeldRowMemory& memory, float loose_logit, int64_t token, U* out) const {
    const Gradient gradient = memory.gradient;
    Target<T, U> target(split, token, out);
    target.out += begin * kPerGranule<T>;
    target.token_granule -= begin;  // not in [0, count) if it is in another share
    const int thread = threadIdx.x, threads = blockDim.x;
    if (thread < loose) {
      const int64_t i = split.element(thread, size);
      write_element<false>(loose_logit, gradient, i == token, out + i);
    }
    for (int g = thread; g < count; g += threads)
      target.template write<false>(g, memory.granules()[g], gradient);
  }
};

// For one thread, before the cluster's barrier.
__device__ __forceinline__ void init_memory(HeldRowMemory& memory) {
  init_landings(&memory.exchange, 1 + kMaxPieces);
  expect_bytes(&memory.exchange, cluster_size() * sizeof(Granule));
}

// Sums over the cluster, from the sums of this block in its thread 0; the result is for thread 0 of
// every block, and the same in all. Every block sends its sums to all and waits for those sent to
// it, so that nothing is in flight to a block that has ended. A block that is alone sends nothing:
// without a cluster the store is an illegal instruction.
__device__ __forceinline__ Partial reduce_cluster(Partial block, float scale,
                                                  HeldRowMemory& memory) {
  const int rank = cluster_rank(), ranks = cluster_size(), thread = threadIdx.x;
  cluster_wait();
  if (ranks == 1) return block;
  if (thread < kWarp) {
    const Granule message = {float_to_bits(shuffle(block.max, 0)),
                             float_to_bits(shuffle(block.sum, 0)),
                             float_to_bits(shuffle(block.weighted, 0)), 0};
    if (thread < ranks) send_to_rank(&memory.ranks[rank], thread, message, &memory.exchange);
  }
  Partial total = empty_partial();
  if (thread == 0) {
    wait_landing<true>(&memory.exchange);
    for (int i = 0; i < ranks; ++i) {
      const Granule& from = memory.ranks[i];
      total = combine(total,
                      {bits_to_float(from.words[0]), bits_to_float(from.words[1]),
                       bits_to_float(from.words[2])},
                      scale);
    }
  }
  return total;
}

// How many blocks of a held row share a multiprocessor, at most kHeldBlocks.
inline int64_t held_blocks(const SharedMemory& memory, int64_t shared_bytes) {
  if (shared_bytes > memory.per_block) return 0;
  return std::min<int64_t>(kHeldBlocks,
                           memory.per_multiprocessor / (shared_bytes + memory.reserved_per_block));
}

// How to hold rows of `bytes` bytes; threads is 0 if no cluster can. The kernel must have room for
// a cluster larger than is portable, which is taken only if more of its blocks share a
// multiprocessor.
template <class Kernel>
LaunchShape plan_held_row(Kernel kernel, int64_t rows, int64_t bytes) {
  const SharedMemory memory = shared_memory();
  LaunchShape best;
  int64_t most = 0;
  for (int cluster = 1; cluster <= kMaxCluster && most < kHeldBlocks; cluster *= 2) {
    const int64_t granules = ceil_div(bytes / static_cast<int64_t>(sizeof(Granule)), cluster);
    const int64_t shared = sizeof(HeldRowMemory) + granules * sizeof(Granule);
    const LaunchShape shape = {rows * cluster, row_threads(granules, kPieceGranules, kHeldThreads),
                               shared, cluster};
    const int64_t blocks = held_blocks(memory, shared);
    if (blocks <= most || (cluster > kPortableCluster && !has_room(kernel, shape))) continue;
    best = shape;
    most = blocks;
  }
  return best;
}

}  // namespace spo
