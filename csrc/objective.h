#pragma once
// The objective of one token and its derivatives by the token's logprob and entropy, shared by the
// CPU and CUDA kernels. PyTorch's counterpart is `evaluate` in spo_kernels/objective.py. What
// happens before and after the rows is in csrc/prepare.h.
#include <cmath>
#include <cstdint>

#include "csrc/ops.h"

namespace spo {

#define SPO_IGNORE(type, name, initial)
#define SPO_VALUE(name, absent) float name;
#define SPO_READ(name, absent) token.name = a.name ? a.name[row] : absent;

// The values of one token. Kernels read them while they wait for its logprob.
struct Token {
  SPO_TOKEN_FIELDS(SPO_IGNORE, SPO_VALUE)
  float policy_scale;   // 1 / Z
  float kl_scale;       // kl_coef / Z_kl
  float entropy_scale;  // entropy_coef / Z
  uint8_t use;
};

SPO_HOST_DEVICE Token read_token(const PolicyLossArgs& a, int64_t row, uint8_t use) {
  Token token;
  SPO_TOKEN_FIELDS(SPO_IGNORE, SPO_READ)
  token.policy_scale = a.scales[0];
  token.kl_scale = a.scales[1];
  token.entropy_scale = a.scales[2];
  token.use = use;
  return token;
}

template <class Int>
SPO_HOST_DEVICE Int read_as(const void* array, int64_t i) {
  return static_cast<const Int*>(array)[i];
}

SPO_HOST_DEVICE int64_t token_id(const PolicyLossArgs& a, int64_t token) {
  return a.id_bytes == 4 ? read_as<int32_t>(a.token_ids, token)
                         : read_as<int64_t>(a.token_ids, token);
}

SPO_HOST_DEVICE float temperature_of(const PolicyLossArgs& a, int64_t token) {
  return a.temperature ? a.temperature[token * a.temperature_stride]
                       : static_cast<float>(a.temperature_value);
}

// The sweeps work on y = tanh(k x), or on x if k is 0, at a temperature divided by the cap or the
// scale of the logits: see csrc/cpu/softmax.h.
SPO_HOST_DEVICE float tanh_scale_of(const PolicyLossArgs& a) {
  return a.logit_softcap < INFINITY ? a.logit_scale / a.logit_softcap : 0;
}

SPO_HOST_DEVICE float swept_temperature_of(const PolicyLossArgs& a, int64_t token) {
  const float divisor = a.logit_softcap < INFINITY ? a.logit_softcap : a.logit_scale;
  return temperature_of(a, token) / divisor;
}

// The probability mask needs the logprobs of this pass.
SPO_HOST_DEVICE bool masks_late(const PolicyLossArgs& a) {
  return !a.old_logprobs && a.log_threshold < INFINITY;
}

// No member initialisers: their constructor would be one symbol for all instruction sets.
struct TokenLoss {
  float stats[kStats];  // by `Stat`
  float dlogprob;       // d loss / d logprob
  float dentropy;       // d loss / d entropy
  uint8_t use;          // the token's, as the mask of this pass leaves it
};

// exp(clamp(logprob - old_logprob)) and its derivative; 1 and 1 on-policy. NaN reaches the result.
struct Ratio {
  float value, slope;
};

SPO_HOST_DEVICE Ratio importance_ratio(const PolicyLossArgs& a, const Token& token, float logprob) {
  const float bound = a.log_ratio_clamp;
  const float difference = a.old_logprobs ? logprob - token.old_logprobs : logprob - logprob;
  const bool below = difference < -bound;
  const bool above = difference > bound;
  const float value = expf(below ? -bound : above ? bound : difference);
  return {value, below || above ? 0 : value};
}

// -w min(ratio A, clip(ratio) A) / Z, for A < 0 at most -w clip_ratio_max A / Z. The comparisons
// are written so that NaN reaches the result and so that a boundary counts as inside, as in
// PyTorch.
SPO_HOST_DEVICE void add_policy(const PolicyLossArgs& a, const Token& token, const Ratio& ratio,
                                TokenLoss* out) {
  out->stats[kRatio] = ratio.value;
  const float advantage = token.advantages;
  if (advantage == 0) return;
  const bool low = advantage < 0 && ratio.value < 1 - a.clip_eps_low;
  const bool high = advantage > 0 && ratio.value > 1 + a.clip_eps_high;
  const bool most = advantage < 0 && ratio.value > a.clip_ratio_max;
  out->stats[kLow] = low;
  out->stats[kHigh] = high;
  out->stats[kMax] = most;
  if (token.policy_scale == 0) return;
  const float scale = -token.policy_scale * token.weights * advantage;
  out->stats[kPolicyTerm] = scale * (low    ? 1 - a.clip_eps_low
                                     : high ? 1 + a.clip_eps_high
                                     : most ? a.clip_ratio_max
                                            : ratio.value);
  if (!low && !high && !most) out->dlogprob += scale * ratio.slope;
}

// k1 = p - q, k2 = (p - q)^2 / 2, k3 = exp(d) - d - 1 with d = clamp(q - p, +-kl_clamp), for the
// logprobs p of the policy and q of the reference; times the ratio if `kl_ratio`.
SPO_HOST_DEVICE void add_kl(const PolicyLossArgs& a, const Token& token, const Ratio& ratio,
                            float logprob, TokenLoss* out) {
  const float difference = logprob - token.ref_logprobs, bound = a.kl_clamp;
  float value = difference, slope = 1;
  if (a.kl_estimator == kK2) {
    value = 0.5f * difference * difference;
    slope = difference;
  } else if (a.kl_estimator == kK3) {
    const bool below = difference < -bound;
    const bool above = difference > bound;
    const float d = below ? bound : above ? -bound : -difference;
    value = expm1f(d) - d;
    slope = below || above ? 0 : -expm1f(d);
  }
  out->stats[kKlEstimate] = value;
  if (token.kl_scale == 0) return;
  if (a.kl_ratio) {  // a clamped ratio has no slope, not even times an infinite value
    slope = slope * ratio.value + (ratio.slope == 0 ? 0 : value * ratio.slope);
    value *= ratio.value;
  }
  const float scale = token.kl_scale * token.kl_weights;
  out->stats[kKlTerm] = scale * value;
  out->dlogprob += scale * slope;
}

SPO_HOST_DEVICE TokenLoss token_loss(const PolicyLossArgs& a, const Token& token, float logprob,
                                     float entropy) {
  TokenLoss loss = {};
  loss.use = token.use;
  if (masks_late(a) && logprob >= a.log_threshold)
    loss.use &= a.kl_scope == kAll ? ~kInPolicy : ~(kInPolicy | kInKl);
  const Ratio ratio = importance_ratio(a, token, logprob);
  if (loss.use & kInPolicy) add_policy(a, token, ratio, &loss);
  if (loss.use & kInKl) add_kl(a, token, ratio, logprob, &loss);
  if ((loss.use & kInPolicy) && token.entropy_scale != 0) {
    loss.stats[kEntropyTerm] = -token.entropy_scale * entropy;
    loss.dentropy = -token.entropy_scale;
  }
  return loss;
}

}  // namespace spo
