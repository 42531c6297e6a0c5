// masked_ppo_loss on the CPU: per row one sweep for the log-sum-exp, then the scalar objective,
// then one sweep that writes dlogits. Rows that carry no loss are never read.
#include "csrc/cpu/softmax.h"
#include "csrc/cpu/vec.h"
#include "csrc/objective.h"
#include "csrc/ops.h"

namespace spo {
namespace SPO_ISA {

template <class U>
static void zero_row(const PolicyLossArgs& a, int64_t row) {
  if (a.dlogits && !a.dlogits_zeroed)
    std::memset(row_of<U>(a.dlogits, a.dlogits_layout, row), 0, a.vocab * sizeof(U));
}

static void store_row(const PolicyLossArgs& a, int64_t token, float logprob, float entropy,
                      const TokenLoss& loss) {
  a.logprobs[token] = logprob;
  if (a.entropy) a.entropy[token] = entropy;
  std::memcpy(a.stats + kStats * token, loss.stats, sizeof loss.stats);
}

// dlogits_j = g (1[j = token] - p_j) - h p_j (log p_j + H), g and h the derivatives by the logprob
// and the entropy H divided by the temperature; log p_j = ln 2 d_j - logsum. Under a cap all of
// this times k (1 - y_j^2), which is own_slope for the token itself.
template <class T, class U>
static void write_gradient(const PolicyLossArgs& a, const TokenLoss& loss, const T* x,
                           const RowSums& sums, float temperature, float logprob, float entropy,
                           int64_t id, float own_slope, U* out) {
  const float g = loss.dlogprob / temperature * a.scales[3];
  const float h = loss.dentropy / temperature * a.scales[3];
  const float scale = exponent_scale(temperature), tanh_scale = tanh_scale_of(a);
  // 1 - p of the token itself; 1 - exp(logprob) would cancel.
  float own = -g * expm1f(logprob);
  if (h == 0) {
    const double factor = -g / sums.sum;
    write_row<false>(x, a.vocab, sums.max, scale, static_cast<float>(factor), 0, out, tanh_scale);
  } else {
    const double factor = -(g + h * (entropy - ::log(sums.sum))) / sums.sum;
    write_row<true>(x, a.vocab, sums.max, scale, static_cast<float>(factor),
                    static_cast<float>(-h * kLn2 / sums.sum), out, tanh_scale);
    if (logprob != -INFINITY) own -= h * expf(logprob) * (logprob + entropy);
  }
  if (id >= 0) from_float(own * own_slope, out + id);
}

// T: type of the logits, U: of dlogits.
template <class T, class U>
static void policy_loss_row(const PolicyLossArgs& a, int64_t row) {
  const int64_t token = a.index ? a.index[row] : row;
  if (token >= a.tokens) return zero_row<U>(a, row);  // there are fewer tokens than rows
  const uint8_t use = a.uses[token];
  if (!(use & kRuns)) {
    store_row(a, token, NAN, NAN, {});
    return zero_row<U>(a, row);
  }
  const T* x = row_of<T>(a.logits, a.logits_layout, row);
  const int64_t id = token_id(a, token);
  const float temperature = swept_temperature_of(a, token), tanh_scale = tanh_scale_of(a);
  const float exp_scale = exponent_scale(temperature);
  const RowSums sums = reduce_row(x, a.vocab, exp_scale, a.entropy != nullptr, tanh_scale);
  // Else NaN, if Python could not check.
  const bool known = id >= 0 && id < a.vocab && !(use & kLost);
  const CappedLogit chosen = capped_logit(known ? to_float(x[id]) : NAN, tanh_scale);
  const float logprob = static_cast<float>(row_logprob(sums, chosen.value, exp_scale));
  const float entropy = a.entropy ? static_cast<float>(row_entropy(sums)) : 0;
  const TokenLoss loss = token_loss(a, read_token(a, token, use), logprob, entropy);
  if (masks_late(a)) a.uses[token] = loss.use;
  store_row(a, token, logprob, entropy, loss);
  if (!a.dlogits) return;
  if (loss.dlogprob == 0 && loss.dentropy == 0) return zero_row<U>(a, row);
  write_gradient(a, loss, x, sums, temperature, logprob, entropy, known ? id : -1, chosen.slope,
                 row_of<U>(a.dlogits, a.dlogits_layout, row));
}

template <class T, class U = T>
static void policy_loss_range(const PolicyLossArgs& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) policy_loss_row<T, U>(a, row);
}

void policy_loss_rows(const PolicyLossArgs& a, int64_t begin, int64_t end) {
  if (a.dtype == kBFloat16) return policy_loss_range<BFloat16>(a, begin, end);
  if (a.dtype == kFloat16) return policy_loss_range<Float16>(a, begin, end);
  if (a.dlogits && a.dlogits_dtype == kBFloat16)
    return policy_loss_range<float, BFloat16>(a, begin, end);
  if (a.dlogits && a.dlogits_dtype == kFloat16)
    return policy_loss_range<float, Float16>(a, begin, end);
  policy_loss_range<float>(a, begin, end);
}

}  // namespace SPO_ISA
}  // namespace spo

#ifdef SPO_ISA_PORTABLE  // the launcher, compiled once
#include "csrc/cpu/isa.h"
#include "csrc/cpu/parallel.h"

namespace spo {

SPO_PER_ISA(void, policy_loss_rows, (const PolicyLossArgs&, int64_t, int64_t))

void policy_loss_cpu(const PolicyLossArgs& args) {
  const auto rows = policy_loss_rows_for(chosen_isa());
  parallel_for(args.rows, rows_per_piece(args.vocab), args.num_threads,
               [&](int64_t begin, int64_t end) { rows(args, begin, end); });
}

}  // namespace spo
#endif
