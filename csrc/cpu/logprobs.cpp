// token_logprobs on the CPU: one sweep per row forward, one sweep per row backward.
#include "csrc/cpu/softmax.h"
#include "csrc/cpu/vec.h"
#include "csrc/ops.h"

namespace spo {
namespace SPO_ISA {

template <class T>
static void logprobs_row(const LogprobsArgs& a, int64_t row) {
  float logprob = 0, entropy = 0;
  if (!a.mask || a.mask[row]) {
    const T* x = row_of<T>(a.logits, a.logits_layout, row);
    const float scale = exponent_scale(a.temperature[row * a.temperature_stride]);
    const RowSums sums = reduce_row(x, a.vocab, scale, a.entropy != nullptr, a.tanh_scale);
    const float logit = capped_logit(to_float(x[a.token_ids[row]]), a.tanh_scale).value;
    logprob = static_cast<float>(row_logprob(sums, logit, scale));
    if (a.entropy) entropy = static_cast<float>(row_entropy(sums));
    a.row_max[row] = sums.max;
    a.row_logsum[row] = static_cast<float>(::log(sums.sum));
  }
  a.logprobs[row] = logprob;
  if (a.entropy) a.entropy[row] = entropy;
}

// dlogits_j = g (1[j = token] - p_j) - h p_j (log p_j + H), g and h the gradients of logprob and
// entropy divided by the temperature; log p_j = ln 2 d_j - logsum. Under a cap all of this times
// k (1 - y_j^2).
// T: type of the logits, U: of dlogits.
template <class T, class U>
static void logprobs_backward_row(const LogprobsArgs& a, int64_t row) {
  U* out = row_of<U>(a.dlogits, a.dlogits_layout, row);
  const bool masked = a.mask && !a.mask[row];
  const float inv_temperature = masked ? 0 : 1 / a.temperature[row * a.temperature_stride];
  const float g = masked ? 0 : a.grad_logprobs[row] * inv_temperature;
  const float h = masked || !a.grad_entropy ? 0 : a.grad_entropy[row] * inv_temperature;
  if (g == 0 && h == 0) {
    std::memset(out, 0, a.vocab * sizeof(U));
    return;
  }
  const T* x = row_of<T>(a.logits, a.logits_layout, row);
  const int64_t id = a.token_ids[row];
  const float logsum = a.row_logsum[row], logprob = a.logprobs[row];
  const float inv_sum = ::expf(-logsum);
  const float scale = exponent_scale(a.temperature[row * a.temperature_stride]);
  float own = -g * ::expm1f(logprob);
  const float own_slope = capped_logit(to_float(x[id]), a.tanh_scale).slope;
  if (h == 0) {
    write_row<false>(x, a.vocab, a.row_max[row], scale, -g * inv_sum, 0, out, a.tanh_scale);
  } else {
    const float entropy = a.entropy[row];
    write_row<true>(x, a.vocab, a.row_max[row], scale, -(g + h * (entropy - logsum)) * inv_sum,
                    -h * inv_sum * static_cast<float>(kLn2), out, a.tanh_scale);
    own -= h * (logprob == -INFINITY ? 0 : ::expf(logprob) * (logprob + entropy));
  }
  from_float(own * own_slope, out + id);
}

template <class T, class U = T>
static void logprobs_range(const LogprobsArgs& a, bool backward, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row)
    backward ? logprobs_backward_row<T, U>(a, row) : logprobs_row<T>(a, row);
}

void logprobs_rows(const LogprobsArgs& a, bool backward, int64_t begin, int64_t end) {
  if (a.dtype == kBFloat16) return logprobs_range<BFloat16>(a, backward, begin, end);
  if (a.dtype == kFloat16) return logprobs_range<Float16>(a, backward, begin, end);
  if (backward && a.dlogits_dtype == kBFloat16)
    return logprobs_range<float, BFloat16>(a, backward, begin, end);
  if (backward && a.dlogits_dtype == kFloat16)
    return logprobs_range<float, Float16>(a, backward, begin, end);
  logprobs_range<float>(a, backward, begin, end);
}

}  // namespace SPO_ISA
}  // namespace spo

#ifdef SPO_ISA_PORTABLE  // the launchers, compiled once
#include "csrc/cpu/isa.h"
#include "csrc/cpu/parallel.h"

namespace spo {

SPO_PER_ISA(void, logprobs_rows, (const LogprobsArgs&, bool, int64_t, int64_t))

static void launch(const LogprobsArgs& args, bool backward) {
  const auto rows = logprobs_rows_for(chosen_isa());
  parallel_for(args.rows, rows_per_piece(args.vocab), args.num_threads,
               [&](int64_t begin, int64_t end) { rows(args, backward, begin, end); });
}

void logprobs_cpu(const LogprobsArgs& args) { launch(args, false); }
void logprobs_backward_cpu(const LogprobsArgs& args) { launch(args, true); }

}  // namespace spo
#endif
