// masked_ppo_loss on CUDA: per row one sweep for the log-sum-exp, then the scalar objective, then
// one sweep that writes dlogits. Rows that carry no loss are never read.
#include "csrc/cuda/held_row.cuh"

namespace spo {
namespace {

// What one row is for, read before its logits.
struct RowUse {
  int64_t token;  // to which the row belongs; -1 where the row is to be left alone
  uint8_t use;
};

__device__ __forceinline__ RowUse row_use(const PolicyLossArgs& a, int64_t row) {
  const int64_t token = a.index ? a.index[row] : row;
  if (a.strict && a.counts[3]) return {-1, 0};
  if (token >= a.tokens) return {token, 0};  // there are fewer tokens than rows
  return {token, a.uses[token]};
}

__device__ __forceinline__ void store_row(const PolicyLossArgs& a, int64_t token, float logprob,
                                          float entropy, const TokenLoss& loss) {
  a.logprobs[token] = logprob;
  if (a.entropy) a.entropy[token] = entropy;
  Granule halves[2];
#pragma unroll
  for (int k = 0; k < kStats; ++k) halves[k / 4].words[k % 4] = float_to_bits(loss.stats[k]);
  Granule* stats = reinterpret_cast<Granule*>(a.stats) + 2 * token;
  stats[0] = halves[0], stats[1] = halves[1];
}

// The column of the row's token; -1, and a logit of NaN, if it has none.
__device__ __forceinline__ int64_t row_column(const PolicyLossArgs& a, const RowUse& row) {
  const int64_t id = token_id(a, row.token);
  return id >= 0 && id < a.vocab && !(row.use & kLost) ? id : -1;
}

template <class T>
__device__ __forceinline__ RowInputs row_inputs(const PolicyLossArgs& a, const RowUse& row,
                                                const T* x, int64_t column) {
  return {token_logit(x, a.vocab, column), a.scales[3], read_token(a, row.token, row.use)};
}

// For one thread: the objective of a row, its derivatives, and the row's outputs if `stores`.
// dlogits_j = g (1[j = token] - p_j) - h p_j (log p_j + H), g and h the derivatives by the logprob
// and the entropy H divided by the temperature. `logit`: the token's, as the sweep takes it.
__device__ __forceinline__ Gradient finish_row(const PolicyLossArgs& a, int64_t token,
                                               float inv_temperature, const RowInputs& in,
                                               float logit, const Partial& sums, bool stores,
                                               bool* has_gradient) {
  const double logsum = log(static_cast<double>(sums.sum));
  const double distance = (static_cast<double>(logit) - sums.max) * inv_temperature;
  const float logprob = static_cast<float>(distance - logsum);
  const float entropy =
      static_cast<float>(logsum - static_cast<double>(kLn2) * sums.weighted / sums.sum);
  const TokenLoss loss = token_loss(a, in.token, logprob, entropy);
  if (stores) store_row(a, token, logprob, entropy, loss);
  if (stores && masks_late(a)) a.uses[token] = loss.use;
  *has_gradient = loss.dlogprob != 0 || loss.dentropy != 0;
  const float g = loss.dlogprob * inv_temperature * in.power;
  // 1 - p of the token itself; 1 - exp(logprob) would cancel.
  Gradient gradient = {sums.max, inv_temperature * kLog2E, -g / sums.sum, 0, -g * expm1f(logprob)};
  if (loss.dentropy != 0) {
    const float h = loss.dentropy * inv_temperature * in.power;
    gradient.factor -= h * (entropy - static_cast<float>(logsum)) / sums.sum;
    gradient.slope = -h * kLn2 / sums.sum;
    if (logprob != -INFINITY) gradient.own -= h * expf(logprob) * (logprob + entropy);
  }
  return gradient;
}

// A row that is not computed, for one of `parts` blocks.
template <class U>
__device__ __forceinline__ void drop_row(const PolicyLossArgs& a, int64_t row, int64_t token,
                                         int part, int parts) {
  if (token < 0) return;
  if (part == 0 && threadIdx.x == 0 && token < a.tokens) store_row(a, token, NAN, NAN, TokenLoss{});
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
    const RowUse use = row_use(a, row);
    if (!(use.use & kRuns)) return drop_row<U>(a, row, use.token, rank, ranks);
    HeldRowMemory& memory = *reinterpret_cast<HeldRowMemory*>(block_memory());
    const HeldRow<T> held(row_of<T>(a.logits, a.logits_layout, row), a.vocab);
    if (threadIdx.x == 0) init_memory(memory);
    cluster_arrive();
    if (threadIdx.x == 0) held.start_loading(memory);
    sync_block();
    // Read before the blocks exchange their sums: after that dlogits may overwrite the logits.
    const float loose = held.loose_logit();
    const int64_t column = row_column(a, use);
    const float inv_temperature = 1 / swept_temperature_of(a, use.token);
    const float scale = inv_temperature * kLog2E;
    if (threadIdx.x == 0) memory.inputs = row_inputs(a, use, held.row, column);
    Partial p = a.entropy ? held.template sums<true>(memory, loose, scale)
                          : held.template sums<false>(memory, loose, scale);
    p = reduce_block(p, scale, memory.warps);
    p = reduce_cluster(p, scale, memory);
    if (threadIdx.x == 0)
      memory.gradient = finish_row(a, use.token, inv_temperature, memory.inputs,
                                   memory.inputs.logit, p, rank == 0, &memory.has_gradient);
    sync_block();
    U* out = row_of<U>(a.dlogits, a.dlogits_layout, row);
    if (memory.has_gradient) {
      held.write(memory, loose, column, out);
    } else if (!a.dlogits_zeroed) {
      zero_row(out, a.vocab, rank, ranks);
    }
  }
}

constexpr int kCappedThreads = 768;  // of 1024 threads each would spill, for sm_100

struct StreamedRowMemory {
  Partial warps[kMaxWarps];
  Gradient gradient;
  bool has_gradient;
};

// One block per row, in two passes: used if there are no clusters, if a row is larger than a
// cluster can hold, for a soft cap and the gradient of the entropy, which need more registers than
// a held row leaves, and if no gradient is wanted, so that one pass is enough.
template <bool kCapped, class T, class U>
__device__ __forceinline__ void stream_row(const PolicyLossArgs& a) {
  const int64_t row = blockIdx.x;
  const RowUse use = row_use(a, row);
  if (!(use.use & kRuns)) return drop_row<U>(a, row, use.token, 0, 1);
  StreamedRowMemory& memory = *reinterpret_cast<StreamedRowMemory*>(block_memory());
  const T* x = row_of<T>(a.logits, a.logits_layout, row);
  const int64_t column = row_column(a, use);
  const float inv_temperature = 1 / swept_temperature_of(a, use.token);
  const float scale = inv_temperature * kLog2E, tanh_scale = tanh_scale_of(a);
  Partial p = a.entropy ? sum_row<true, kCapped>(x, a.vocab, scale, tanh_scale)
                        : sum_row<false, kCapped>(x, a.vocab, scale, tanh_scale);
  p = reduce_block(p, scale, memory.warps);
  if (threadIdx.x == 0) {
    const RowInputs inputs = row_inputs(a, use, x, column);
    const float logit = swept_logit<kCapped>(inputs.logit, tanh_scale);
    memory.gradient =
        finish_row(a, use.token, inv_temperature, inputs, logit, p, true, &memory.has_gradient);
  }
  if (!a.dlogits) return;
  sync_block();
  U* out = row_of<U>(a.dlogits, a.dlogits_layout, row);
  if (memory.has_gradient && a.entropy_coef != 0) {
    write_row<true, kCapped>(x, a.vocab, memory.gradient, column, out, tanh_scale);
  } else if (memory.has_gradient) {
    write_row<false, kCapped>(x, a.vocab, memory.gradient, column, out, tanh_scale);
  } else if (!a.dlogits_zeroed) {
    zero_row(out, a.vocab, 0, 1);
  }
}

template <class T, class U>
__global__ void __launch_bounds__(1024)
    policy_loss_streamed(const __grid_constant__ PolicyLossArgs a) {
  stream_row<false, T, U>(a);
}
template <class T, class U>
__global__ void __launch_bounds__(kCappedThreads)
    policy_loss_streamed_capped(const __grid_constant__ PolicyLossArgs a) {
  stream_row<true, T, U>(a);
}

template <class T, class U = T>
void launch_rows(const PolicyLossArgs& args) {
  LaunchShape shape;
  const bool capped = tanh_scale_of(args) != 0;
  const bool holds = args.dlogits && args.entropy_coef == 0 && !capped;
  if (holds && has_clusters(policy_loss_held<T, U>))
    shape = plan_held_row(policy_loss_held<T, U>, args.rows, args.vocab * sizeof(T));
  if (shape.threads) return launch(policy_loss_held<T, U>, shape, args.stream, args);
  // With a second pass, one block of 1024 threads per multiprocessor: the fewer rows are in flight,
  // the more of each row is still in the L2 cache.
  shape.blocks = args.rows;
  const int most = !args.dlogits ? 512 : capped ? kCappedThreads : 1024;
  shape.threads = row_threads(args.vocab / kPerGranule<T>, kInFlight, most);
  shape.shared_bytes = sizeof(StreamedRowMemory);
  const auto kernel = capped ? policy_loss_streamed_capped<T, U> : policy_loss_streamed<T, U>;
  launch(kernel, shape, args.stream, args);
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
