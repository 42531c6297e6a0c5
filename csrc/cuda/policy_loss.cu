// masked_ppo_loss on CUDA: per row one sweep for the log-sum-exp, then the scalar objective, then
// one sweep that writes dlogits. Rows that carry no loss are never read.
#include "csrc/cuda/held_row.cuh"

namespace spo {
namespace {

// The inputs of one row, read before its logits.
struct Terms {
  int64_t token;  // to which the row belongs; -1 where the row is to be left alone
  uint8_t use;
  bool policy, kl;

  __device__ bool any() const { return policy || kl; }
};

__device__ __forceinline__ Terms row_terms(const PolicyLossArgs& a, int64_t row) {
  const int64_t token = a.index ? a.index[row] : row;
  if (a.strict && a.counts[3]) return {-1, 0, false, false};
  if (token >= a.tokens) return {token, 0, false, false};  // there are fewer tokens than rows
  // No && between the loads, so that they run in parallel.
  const uint8_t use = a.uses[token];
  const bool acts = a.advantages[token] != 0;
  return {token, use, (use & kInPolicy) && acts, (use & kInKl) != 0};
}

__device__ __forceinline__ void store_row(const PolicyLossArgs& a, int64_t token, float logprob,
                                          float entropy, const TokenLoss& loss) {
  a.logprobs[token] = logprob;
  if (a.entropy) a.entropy[token] = entropy;
  float* stats = a.stats + 4 * token;
  stats[0] = loss.policy;
  stats[1] = loss.kl;
  stats[2] = loss.clipped;
  stats[3] = loss.ratio;
}

// The column of the row's token; -1, and a logit of NaN, if it has none.
__device__ __forceinline__ int64_t row_column(const PolicyLossArgs& a, const Terms& terms) {
  const int64_t id = token_id(a, terms.token);
  return id >= 0 && id < a.vocab && !(terms.use & kLost) ? id : -1;
}

template <class T>
__device__ __forceinline__ RowInputs row_inputs(const PolicyLossArgs& a, const Terms& terms,
                                                const T* x, int64_t column) {
  return {token_logit(x, a.vocab, column), a.scales[2], read_token(a, terms.token)};
}

// For one thread: the objective of a row, its derivative, and the row's outputs if `stores`.
__device__ __forceinline__ Gradient finish_row(const PolicyLossArgs& a, const Terms& terms,
                                               float inv_temperature, const RowInputs& in,
                                               const Partial& sums, bool stores,
                                               bool* has_gradient) {
  const double logsum = log(static_cast<double>(sums.sum));
  const double distance = (static_cast<double>(in.logit) - sums.max) * inv_temperature;
  const float logprob = static_cast<float>(distance - logsum);
  const TokenLoss loss = token_loss(a, in.token, terms.policy, terms.kl, logprob);
  if (stores) {
    const double entropy = logsum - static_cast<double>(kLn2) * sums.weighted / sums.sum;
    store_row(a, terms.token, logprob, static_cast<float>(entropy), loss);
  }
  *has_gradient = loss.dlogprob != 0;
  const float g = loss.dlogprob * inv_temperature * in.power;
  // 1 - p of the token itself; 1 - exp(logprob) would cancel.
  return {sums.max, inv_temperature * kLog2E, -g / sums.sum, 0, -g * expm1f(logprob)};
}

// A row without a loss, for one of `parts` blocks.
template <class U>
__device__ __forceinline__ void drop_row(const PolicyLossArgs& a, int64_t row, int64_t token,
                                         int part, int parts) {
  if (token < 0) return;
  if (part == 0 && threadIdx.x == 0 && token < a.tokens) store_row(a, token, 0, 0, TokenLoss{});
  if (a.dlogits && !a.dlogits_zeroed)
    zero_row(row_of<U>(a.dlogits, a.dlogits_layout, row), a.vocab, part, parts);
}

// One cluster per row: one read and one write of the logits. T: their type, U: of the gradient.
template <class T, class U>
__global__ void __launch_bounds__(kHeldThreads, kHeldBlocks)
    policy_loss_held(const __grid_constant__ PolicyLossArgs a) {
  if constexpr (kHasClusters) {
    const int rank = cluster_rank(), ranks = cluster_size();
    const int64_t row = blockIdx.x / ranks;
    const Terms terms = row_terms(a, row);
    if (!terms.any()) return drop_row<U>(a, row, terms.token, rank, ranks);
    HeldRowMemory& memory = *reinterpret_cast<HeldRowMemory*>(block_memory());
    const HeldRow<T> held(row_of<T>(a.logits, a.logits_layout, row), a.vocab);
    if (threadIdx.x == 0) init_memory(memory);
    cluster_arrive();
    if (threadIdx.x == 0) held.start_loading(memory);
    sync_block();
    // Read before the blocks exchange their sums: after that dlogits may overwrite the logits.
    const float loose = held.loose_logit();
    const int64_t column = row_column(a, terms);
    const float inv_temperature = 1 / temperature_of(a, terms.token);
    const float scale = inv_temperature * kLog2E;
    if (threadIdx.x == 0) memory.inputs = row_inputs(a, terms, held.row, column);
    Partial p = a.entropy ? held.template sums<true>(memory, loose, scale)
                          : held.template sums<false>(memory, loose, scale);
    p = reduce_block(p, scale, memory.warps);
    p = reduce_cluster(p, scale, memory);
    if (threadIdx.x == 0)
      memory.gradient =
          finish_row(a, terms, inv_temperature, memory.inputs, p, rank == 0, &memory.has_gradient);
    sync_block();
    U* out = row_of<U>(a.dlogits, a.dlogits_layout, row);
    if (memory.has_gradient) {
      held.write(memory, loose, column, out);
    } else if (!a.dlogits_zeroed) {
      zero_row(out, a.vocab, rank, ranks);
    }
  }
}

struct StreamedRowMemory {
  Partial warps[kMaxWarps];
  Gradient gradient;
  bool has_gradient;
};

// One block per row, in two passes: used if there are no clusters, if a row is larger than a
// cluster can hold, or if no gradient is wanted, so that one pass is enough.
template <class T, class U>
__global__ void __launch_bounds__(1024)
    policy_loss_streamed(const __grid_constant__ PolicyLossArgs a) {
  const int64_t row = blockIdx.x;
  const Terms terms = row_terms(a, row);
  if (!terms.any()) return drop_row<U>(a, row, terms.token, 0, 1);
  StreamedRowMemory& memory = *reinterpret_cast<StreamedRowMemory*>(block_memory());
  const T* x = row_of<T>(a.logits, a.logits_layout, row);
  const int64_t column = row_column(a, terms);
  const float inv_temperature = 1 / temperature_of(a, terms.token);
  const float scale = inv_temperature * kLog2E;
  Partial p = a.entropy ? sum_row<true>(x, a.vocab, scale) : sum_row<false>(x, a.vocab, scale);
  p = reduce_block(p, scale, memory.warps);
  if (threadIdx.x == 0) {
    const RowInputs inputs = row_inputs(a, terms, x, column);
    memory.gradient = finish_row(a, terms, inv_temperature, inputs, p, true, &memory.has_gradient);
  }
  if (!a.dlogits) return;
  sync_block();
  U* out = row_of<U>(a.dlogits, a.dlogits_layout, row);
  if (memory.has_gradient) {
    write_row<false>(x, a.vocab, memory.gradient, column, out);
  } else if (!a.dlogits_zeroed) {
    zero_row(out, a.vocab, 0, 1);
  }
}

template <class T, class U = T>
void launch_rows(const PolicyLossArgs& args) {
  LaunchShape shape;
  if (args.dlogits && has_clusters(policy_loss_held<T, U>))
    shape = plan_held_row(policy_loss_held<T, U>, args.rows, args.vocab * sizeof(T));
  if (shape.threads) return launch(policy_loss_held<T, U>, shape, args.stream, args);
  // With a second pass, one block of 1024 threads per multiprocessor: the fewer rows are in flight,
  // the more of each row is still in the L2 cache.
  shape.blocks = args.rows;
  shape.threads = row_threads(args.vocab / kPerGranule<T>, kInFlight, args.dlogits ? 1024 : 512);
  shape.shared_bytes = sizeof(StreamedRowMemory);
  launch(policy_loss_streamed<T, U>, shape, args.stream, args);
}

}  // namespace

void policy_loss_cuda(const PolicyLossArgs& args) {
  if (args.dtype == kBFloat16) return launch_rows<BFloat16>(args);
  if (args.dtype == kFloat16) return launch_rows<Float16>(args);
  if (args.dlogits && args.dlogits_dtype == kBFloat16) return launch_rows<float, BFloat16>(args);
  if (args.dlogits && args.dlogits_dtype == kFloat16) return launch_rows<float, Float16>(args);
  launch_rows<float>(args);
}

}  // namespace spo
