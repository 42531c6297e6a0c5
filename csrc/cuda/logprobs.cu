// token_logprobs on CUDA: one block per row, one sweep forward, one sweep backward. The forward
// writes nothing per logit, and the backward reads the saved sums, so no kernel reads a row twice.
#include "csrc/cuda/row.cuh"

namespace spo {
namespace {

constexpr int kThreads = 512;

// kCapped: with the soft cap of csrc/cuda/softcap.cuh.
template <bool kCapped, class T>
__device__ __forceinline__ void forward_row(const LogprobsArgs& a) {
  const int64_t row = blockIdx.x;
  if (a.mask && !a.mask[row]) {
    if (threadIdx.x == 0) {
      a.logprobs[row] = 0;
      if (a.entropy) a.entropy[row] = 0;
    }
    return;
  }
  const T* x = row_of<T>(a.logits, a.logits_layout, row);
  // Loads of the token and the temperature run in parallel; the sweep hides that of the logit.
  int64_t token = a.token_ids[row];
  load_now(token);
  const float inv_temperature = 1 / a.temperature[row * a.temperature_stride];
  const float scale = inv_temperature * kLog2E;
  const float logit = threadIdx.x == 0 ? token_logit(x, a.vocab, token) : 0;
  Partial p = a.entropy ? sum_row<true, kCapped>(x, a.vocab, scale, a.tanh_scale)
                        : sum_row<false, kCapped>(x, a.vocab, scale, a.tanh_scale);
  p = reduce_block(p, scale, reinterpret_cast<Partial*>(block_memory()));
  if (threadIdx.x != 0) return;
  const double logsum = log(static_cast<double>(p.sum));
  const double chosen = swept_logit<kCapped>(logit, a.tanh_scale);
  const double distance = (chosen - p.max) * inv_temperature;
  a.logprobs[row] = static_cast<float>(distance - logsum);
  if (a.entropy)
    a.entropy[row] = static_cast<float>(logsum - static_cast<double>(kLn2) * p.weighted / p.sum);
  a.row_max[row] = p.max;
  a.row_logsum[row] = static_cast<float>(logsum);
}

// dlogits_j = g (1[j = token] - p_j) - h p_j (log p_j + H), g and h the gradients of logprob and
// entropy divided by the temperature; log p_j = ln(2) d_j - logsum with d_j as in Partial. Under a
// cap all of this times k (1 - y_j^2).
// T: type of the logits, U: of dlogits.
template <bool kCapped, class T, class U>
__device__ __forceinline__ void backward_row(const LogprobsArgs& a) {
  const int64_t row = blockIdx.x;
  U* out = row_of<U>(a.dlogits, a.dlogits_layout, row);
  const bool masked = a.mask && !a.mask[row];
  const float inv_temperature = masked ? 0 : 1 / a.temperature[row * a.temperature_stride];
  const float g = masked ? 0 : a.grad_logprobs[row] * inv_temperature;
  const float h = masked || !a.grad_entropy ? 0 : a.grad_entropy[row] * inv_temperature;
  if (g == 0 && h == 0) return zero_row(out, a.vocab, 0, 1);
  const T* x = row_of<T>(a.logits, a.logits_layout, row);
  const int64_t token = a.token_ids[row];
  const float logsum = a.row_logsum[row], logprob = a.logprobs[row];
  const float inv_sum = expf(-logsum);
  Gradient gradient = {a.row_max[row], inv_temperature * kLog2E, -g * inv_sum, 0,
                       -g * expm1f(logprob)};
  if (h == 0) return write_row<false, kCapped>(x, a.vocab, gradient, token, out, a.tanh_scale);
  const float entropy = a.entropy[row];
  gradient.factor = -(g + h * (entropy - logsum)) * inv_sum;
  gradient.slope = -h * inv_sum * kLn2;
  if (logprob != -INFINITY) gradient.own -= h * expf(logprob) * (logprob + entropy);
  write_row<true, kCapped>(x, a.vocab, gradient, token, out, a.tanh_scale);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    logprobs_forward(const __grid_constant__ LogprobsArgs a) {
  forward_row<false, T>(a);
}
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    logprobs_forward_capped(const __grid_constant__ LogprobsArgs a) {
  forward_row<true, T>(a);
}
template <class T, class U>
__global__ void __launch_bounds__(kThreads, 2)
    logprobs_backward(const __grid_constant__ LogprobsArgs a) {
  backward_row<false, T, U>(a);
}
template <class T, class U>
__global__ void __launch_bounds__(kThreads, 2)
    logprobs_backward_capped(const __grid_constant__ LogprobsArgs a) {
  backward_row<true, T, U>(a);
}

template <class T, class U = T>
void launch_rows(const LogprobsArgs& args, bool backward) {
  LaunchShape shape;
  shape.blocks = args.rows;
  shape.threads = row_threads(args.vocab / kPerGranule<T>, kInFlight, kThreads);
  shape.shared_bytes = kMaxWarps * sizeof(Partial);
  const bool capped = args.tanh_scale != 0;
  const auto forward = capped ? logprobs_forward_capped<T> : logprobs_forward<T>;
  const auto second = capped ? logprobs_backward_capped<T, U> : logprobs_backward<T, U>;
  launch(backward ? second : forward, shape, args.stream, args);
}

void launch_rows(const LogprobsArgs& args, bool backward) {
  if (args.dtype == kBFloat16) return launch_rows<BFloat16>(args, backward);
  if (args.dtype == kFloat16) return launch_rows<Float16>(args, backward);
  if (backward && args.dlogits_dtype == kBFloat16) return launch_rows<float, BFloat16>(args, true);
  if (backward && args.dlogits_dtype == kFloat16) return launch_rows<float, Float16>(args, true);
  launch_rows<float>(args, backward);
}

}  // namespace

void logprobs_cuda(const LogprobsArgs& args) { launch_rows(args, false); }
void logprobs_backward_cuda(const LogprobsArgs& args) { launch_rows(args, true); }

}  // namespace spo
