// Cutpoints to segments, and segment values to token advantages, on CUDA.
#include <cmath>

#include "csrc/cuda/offsets.cuh"
#include "csrc/cuda/reduce.cuh"
#include "csrc/ops.h"

namespace spo {
namespace {

constexpr int kSegmentThreads = 512;
constexpr int64_t kSegmentMemory = kMaxWarps * sizeof(int64_t);

// At the start of the workspace; all of it starts as 0.
struct Findings {
  int64_t result;  // M, or kMalformed
  int32_t has_nan;
};

// Boundaries of a sequence: its start, and cutpoints number 0, interval, 2 interval, ... The first
// cutpoint counts once if it is the start. One block per sequence. NaN has its own flag, because
// the threads of a block must agree on whether to go on.
__global__ void count_segments(const __grid_constant__ SegmentsArgs a, int32_t* has_nan,
                               const int64_t* result) {
  if (*result == kMalformed) return;
  const int64_t seq = blockIdx.x, begin = a.cu_seqlens[seq], end = a.cu_seqlens[seq + 1];
  int64_t mine = 0, cutpoints = 0;
  for (int64_t t = begin + threadIdx.x; t < end; t += blockDim.x) {
    const float logprob = a.logprobs[t];
    if (logprob != logprob) *has_nan = 1;
    mine += logprob < a.log_threshold;
  }
  prefix_sum(mine, reinterpret_cast<int64_t*>(block_memory()), &cutpoints);
  if (threadIdx.x == 0) {
    const bool starts = begin < end && a.logprobs[begin] < a.log_threshold;
    a.cu_seq_segments[seq + 1] = (begin < end) + ceil_div(cutpoints, a.interval) - starts;
  }
}

// Turns counts into offsets, in place, by one block; the result becomes their number.
__global__ void offset_segments(const __grid_constant__ SegmentsArgs a, const int32_t* has_nan,
                                int64_t* result) {
  if (*result == kMalformed || *has_nan) {
    if (threadIdx.x == 0) *result = kMalformed;
    return;
  }
  int64_t carry = 0;
  for (int64_t first = 0; first < a.seqs; first += blockDim.x) {
    const int64_t seq = first + threadIdx.x;
    int64_t total;
    const int64_t count = seq < a.seqs ? a.cu_seq_segments[seq + 1] : 0;
    const int64_t before = prefix_sum(count, reinterpret_cast<int64_t*>(block_memory()), &total);
    if (seq < a.seqs) a.cu_seq_segments[seq + 1] = carry + before + count;
    carry += total;
  }
  if (threadIdx.x == 0) {
    a.cu_seq_segments[0] = 0;
    a.cu_segments[carry] = a.tokens;
    *result = carry;
  }
}

__global__ void write_segments(const __grid_constant__ SegmentsArgs a, const int64_t* result) {
  if (*result == kMalformed) return;
  const int64_t seq = blockIdx.x, begin = a.cu_seqlens[seq], end = a.cu_seqlens[seq + 1];
  const bool starts = begin < end && a.logprobs[begin] < a.log_threshold;
  // Index of cutpoint number 0: after the boundary at the start, unless it is that boundary.
  int64_t* boundaries = a.cu_segments + a.cu_seq_segments[seq] + !starts;
  if (threadIdx.x == 0 && begin < end && !starts) boundaries[-1] = begin;
  int64_t passed = 0;  // cutpoints before the chunk
  for (int64_t first = begin; first < end; first += blockDim.x) {
    const int64_t t = first + threadIdx.x;
    const int64_t cut = t < end && a.logprobs[t] < a.log_threshold;
    int64_t total;
    const int64_t number =
        passed + prefix_sum(cut, reinterpret_cast<int64_t*>(block_memory()), &total);
    if (cut && number % a.interval == 0) boundaries[number / a.interval] = t;
    passed += total;
  }
}

// How many of offsets (count,) are at most `value`.
__device__ __forceinline__ int64_t count_up_to(const int64_t* offsets, int64_t count,
                                               int64_t value) {
  int64_t low = 0;
  while (low < count) {
    const int64_t middle = (low + count) / 2;
    if (offsets[middle] <= value) {
      low = middle + 1;
    } else {
      count = middle;
    }
  }
  return low;
}

// One thread per token does two short binary searches, whatever the lengths of the segments.
__global__ void advance_tokens(const __grid_constant__ SegmentAdvantagesArgs a,
                               const int64_t* result) {
  const int64_t t = thread_item();
  if (t >= a.tokens) return;
  if (*result == kMalformed) {
    a.advantages[t] = NAN;
    return;
  }
  const int64_t segment = count_up_to(a.cu_segments, a.segments + 1, t) - 1;
  // Every sequence has one value more than segments.
  const int64_t seq = count_up_to(a.cu_seq_segments, a.seqs + 1, segment) - 1;
  const float* start = a.values + segment + seq;
  a.advantages[t] = start[1] - start[0];
}

}  // namespace

int64_t segments_workspace(const SegmentsArgs&) { return sizeof(Findings); }

void segments_cuda(const SegmentsArgs& args) {
  const CheckedLaunch run(args.workspace, sizeof(Findings), args.stream);
  int32_t* has_nan = &static_cast<Findings*>(args.workspace)->has_nan;
  check_offsets(run, args.cu_seqlens, args.seqs, args.tokens);
  const LaunchShape per_seq = {args.seqs, kSegmentThreads, kSegmentMemory};
  run.blocks(count_segments, per_seq, args, has_nan);
  run.blocks(offset_segments, {1, kSegmentThreads, kSegmentMemory}, args, has_nan);
  run.blocks(write_segments, per_seq, args);
}

int64_t segment_advantages_workspace(const SegmentAdvantagesArgs&) { return sizeof(int64_t); }

void segment_advantages_cuda(const SegmentAdvantagesArgs& args) {
  const CheckedLaunch run(args.workspace, sizeof(int64_t), args.stream);
  check_offsets(run, args.cu_segments, args.segments, args.tokens);
  check_offsets(run, args.cu_seq_segments, args.seqs, args.segments);
  run.threads(advance_tokens, args.tokens, args);
}

}  // namespace spo
