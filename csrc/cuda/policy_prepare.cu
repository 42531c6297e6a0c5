// What masked_ppo_loss does before and after its rows, on CUDA. One block does it, in a fixed
// order: a token costs it a nanosecond, a row of logits on the whole device a hundred times that.
// Nothing here waits for the host.
#include "csrc/cuda/row.cuh"
#include "csrc/objective.h"

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
  int64_t kept = 0, with_policy = 0, used = 0, bad = 0;
  Slopes most = {};
  for (int64_t first = 0; first < a.tokens; first += kThreads * kPerThread) {
    // A thread's tokens follow each other, so that the used ones get their slots in order.
    const int64_t mine = first + threadIdx.x * kPerThread;
    uint8_t use[kPerThread];
    float advantage[kPerThread];
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
      const bool inside = mine + k < a.tokens;
      use[k] = inside ? token_use(a, mine + k) : 0;
      advantage[k] = inside ? a.advantages[mine + k] : 0;
    }
    uint32_t takes = 0;  // one bit for each token
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
      const int64_t i = mine + k;
      if (i >= a.tokens) continue;
      const bool policy = (use[k] & kInPolicy) && advantage[k] != 0;
      takes |= uint32_t{policy || (use[k] & kInKl)} << k;
      a.uses[i] = use[k];
      kept += use[k] & kInPolicy;
      with_policy += policy;
      if (a.scaled) raise_slopes(a, use[k], i, &most);
      if (is_bad(a, use[k], i)) bad |= kBadToken;
      if (a.index) {  // rows of other tokens are not run
        a.logprobs[i] = 0;
        if (a.entropy) a.entropy[i] = 0;
        reinterpret_cast<Granule*>(a.stats)[i] = Granule{};
      }
    }
    int64_t count = 0;
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) count += takes >> k & 1;
    if (!a.index) {
      used += count;
      continue;
    }
    int64_t here;
    int64_t slot = used + prefix_sum(count, warp_sums(), &here);
    for (int k = 0; k < kPerThread; ++k)
      if (takes >> k & 1) bad |= take_token(a, mine + k, slot++);
    used += here;
  }
  kept = block_total(kept);
  with_policy = block_total(with_policy);
  if (!a.index) used = block_total(used);
  const int64_t bad_tokens = block_total(bad & kBadToken),
                bad_states = block_total(bad & kBadState);
  if (a.scaled) most = {block_most(most.policy), block_most(most.kl)};
  if (a.index && !a.strict) {
    for (int64_t slot = used + threadIdx.x; slot < a.capacity; slot += kThreads)
      a.index[slot] = a.tokens, a.states[slot] = a.num_states, a.sources[slot] = 0;
  }
  if (threadIdx.x != 0) return;
  a.counts[0] = kept, a.counts[1] = with_policy, a.counts[2] = used;
  a.counts[3] = (bad_tokens ? kBadToken : 0) | (bad_states ? kBadState : 0);
  a.counts[4] = a.index && used > a.capacity;
  write_scales(a, kept, most);
}

__global__ void __launch_bounds__(kThreads, 1)
    finish_tokens(const __grid_constant__ PolicyLossArgs a) {
  double sums[4] = {};
  for (int64_t i = threadIdx.x; i < a.tokens; i += kThreads) {
    const Granule stats = reinterpret_cast<const Granule*>(a.stats)[i];
#pragma unroll
    for (int k = 0; k < 4; ++k) sums[k] += bits_to_float(stats.words[k]);
  }
#pragma unroll
  for (double& sum : sums) sum = block_total(sum);
  if (threadIdx.x == 0) write_figures(a, sums);
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
