// What masked_ppo_loss does before and after its rows, on CUDA. One block does it, in a fixed
// order: a token costs it a nanosecond, a row of logits on the whole device a hundred times that.
// Nothing here waits for the host.
#include "csrc/cuda/row.cuh"
#include "csrc/prepare.h"

namespace spo {
namespace {

constexpr int kThreads = 1024, kPerThread = 4;

__device__ __forceinline__ int64_t* warp_sums() {
  return reinterpret_cast<int64_t*>(block_memory());
}

// The sum over the block's threads, in all of them.
template <class T>
__device__ __forceinline__ T block_total(T value) {
  T total;
  prefix_sum(value, reinterpret_cast<T*>(block_memory()), &total);
  return total;
}

// The largest value of the block's threads, in all of them.
__device__ __forceinline__ float block_most(float value) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value = fmaxf(value, shuffle_xor(value, mask));
  float* warps = reinterpret_cast<float*>(block_memory());
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = value;
  sync_block();
  for (int w = 0; w < kThreads / kWarp; ++w) value = fmaxf(value, warps[w]);
  sync_block();
  return value;
}

// Takes a used token into `index` and `states`, if there is room; what is wrong with it.
__device__ __forceinline__ int64_t take_token(const PolicyLossArgs& a, int64_t token,
                                              int64_t slot) {
  const int64_t state = a.hidden_index ? a.hidden_index[token] : token;
  const bool known = state >= 0 && state < a.num_states;
  if (!known) a.uses[token] |= kLost;
  if (slot < a.capacity) {
    a.index[slot] = token;
    a.states[slot] = known ? state : a.num_states;
    a.sources[slot] = known ? state : 0;
  }
  return known ? 0 : kBadState;
}

__global__ void __launch_bounds__(kThreads, 1)
    prepare_tokens(const __grid_constant__ PolicyLossArgs a) {
  int64_t kept = 0, runs = 0, dropped = 0, bad = 0;
  Slopes most = {};
  for (int64_t first = 0; first < a.tokens; first += kThreads * kPerThread) {
    // A thread's tokens follow each other, so that those that run get their slots in order.
    const int64_t mine = first + threadIdx.x * kPerThread;
    Membership tokens[kPerThread];
#pragma unroll
    for (int k = 0; k < kPerThread; ++k)
      tokens[k] = mine + k < a.tokens ? membership(a, mine + k) : Membership{};
    uint32_t takes = 0;  // one bit for each token
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
      const int64_t i = mine + k;
      if (i >= a.tokens) continue;
      const uint8_t use = tokens[k].use;
      takes |= uint32_t{(use & kRuns) != 0} << k;
      a.uses[i] = use;
      kept += use & kInPolicy;
      dropped += tokens[k].dropped;
      if (a.scaled) raise_slopes(a, use, i, &most);
      if (is_bad(a, use, i)) bad |= kBadToken;
      if (a.index) {  // rows of other tokens are not run
        a.logprobs[i] = NAN;
        if (a.entropy) a.entropy[i] = NAN;
        Granule* stats = reinterpret_cast<Granule*>(a.stats) + 2 * i;
        stats[0] = stats[1] = Granule{};
      }
    }
    int64_t count = 0;
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) count += takes >> k & 1;
    if (!a.index) {
      runs += count;
      continue;
    }
    int64_t here;
    int64_t slot = runs + prefix_sum(count, warp_sums(), &here);
    for (int k = 0; k < kPerThread; ++k)
      if (takes >> k & 1) bad |= take_token(a, mine + k, slot++);
    runs += here;
  }
  kept = block_total(kept);
  dropped = block_total(dropped);
  if (!a.index) runs = block_total(runs);
  const int64_t bad_tokens = block_total(bad & kBadToken),
                bad_states = block_total(bad & kBadState);
  if (a.scaled) most = {block_most(most.policy), block_most(most.kl), block_most(most.entropy)};
  if (a.index && !a.strict) {
    for (int64_t slot = runs + threadIdx.x; slot < a.capacity; slot += kThreads)
      a.index[slot] = a.tokens, a.states[slot] = a.num_states, a.sources[slot] = 0;
  }
  if (threadIdx.x != 0) return;
  a.counts[0] = kept, a.counts[2] = runs, a.counts[5] = dropped;
  a.counts[3] = (bad_tokens ? kBadToken : 0) | (bad_states ? kBadState : 0);
  a.counts[4] = a.index && runs > a.capacity;
  write_scales(a, most);
}

__global__ void __launch_bounds__(kThreads, 1)
    finish_tokens(const __grid_constant__ PolicyLossArgs a) {
  static_assert(kStats * sizeof(float) == 2 * sizeof(Granule));
  Totals totals = {};
  for (int64_t i = threadIdx.x; i < a.tokens; i += kThreads) {
    count_use(a.uses[i], &totals);
    const Granule* stats = reinterpret_cast<const Granule*>(a.stats) + 2 * i;
    const Granule halves[2] = {stats[0], stats[1]};
#pragma unroll
    for (int k = 0; k < kStats; ++k) totals.stats[k] += bits_to_float(halves[k / 4].words[k % 4]);
  }
#pragma unroll
  for (double& sum : totals.stats) sum = block_total(sum);
  totals.kept = block_total(totals.kept);
  totals.measured = block_total(totals.measured);
  totals.in_kl = block_total(totals.in_kl);
  if (threadIdx.x == 0) write_figures(a, totals);
}

void launch_block(void (*kernel)(PolicyLossArgs), const PolicyLossArgs& args) {
  LaunchShape shape;
  shape.blocks = 1;
  shape.threads = kThreads;
  shape.shared_bytes = kMaxWarps * sizeof(int64_t);
  launch(kernel, shape, args.stream, args);
}

}  // namespace

#ifndef SPO_CUDA_EMULATION
const char* cuda_problem() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, prepare_tokens);
  if (error == cudaSuccess) return "";
  cudaGetLastError();  // else PyTorch's next call reports it
  return cudaGetErrorString(error);
}
#endif

void policy_prepare_cuda(const PolicyLossArgs& args) { launch_block(prepare_tokens, args); }
void policy_finish_cuda(const PolicyLossArgs& args) { launch_block(finish_tokens, args); }

void policy_step_cuda(const PolicyLossArgs& args) {
  policy_prepare_cuda(args);
  policy_loss_cuda(args);
  policy_finish_cuda(args);
}

}  // namespace spo
