#pragma once
// The objective of one token and its derivative by the token's logprob, shared by the CPU and CUDA
// kernels. PyTorch's counterpart is token_objective in spo_kernels/objective.py.
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
  float policy_scale;  // 1 / Z
  float kl_scale;      // kl_coef / Z_kl
};

SPO_HOST_DEVICE Token read_token(const PolicyLossArgs& a, int64_t row) {
  Token token;
  SPO_TOKEN_FIELDS(SPO_IGNORE, SPO_READ)
  token.policy_scale = a.scales[0];
  token.kl_scale = a.scales[1];
  return token;
}

// No member initialisers: their constructor would be one symbol for all instruction sets.
struct TokenLoss {
  float policy;    // scaled policy term
  float kl;        // scaled KL term
  float clipped;   // 1 where the clipped branch of the objective is the smaller
  float ratio;     // exp(logprob - old_logprob) after the clamp
  float dlogprob;  // d (policy + kl) / d logprob
};

// -min(ratio A, clip(ratio) A) / Z, ratio = exp(clamp(logprob - old_logprob)). The comparisons are
// written so that NaN reaches the result and so that a boundary counts as inside, as in PyTorch.
SPO_HOST_DEVICE void add_policy(const PolicyLossArgs& a, const Token& token, float logprob,
                                TokenLoss* out) {
  const float advantage = token.advantages, bound = a.log_ratio_clamp;
  const float difference = logprob - token.old_logprobs;
  const bool outside = difference < -bound || difference > bound;
  const float log_ratio = difference < -bound ? -bound : difference > bound ? bound : difference;
  const float ratio = expf(log_ratio);
  const float low = 1 - a.clip_eps_low, high = 1 + a.clip_eps_high;
  const float clipped_ratio = ratio < low ? low : ratio > high ? high : ratio;
  const bool clipped = ratio * advantage > clipped_ratio * advantage;
  out->ratio = ratio;
  out->clipped = clipped ? 1.0f : 0.0f;
  out->policy = -token.policy_scale * (clipped ? clipped_ratio : ratio) * advantage;
  if (!clipped && !outside) out->dlogprob -= token.policy_scale * ratio * advantage;
}

// k1 = p - q, k2 = (p - q)^2 / 2, k3 = exp(d) - d - 1 with d = clamp(q - p, -10, 10), for the
// logprobs p of the policy and q of the reference.
SPO_HOST_DEVICE void add_kl(const PolicyLossArgs& a, const Token& token, float logprob,
                            TokenLoss* out) {
  const float difference = logprob - token.ref_logprobs;
  float value = difference, slope = 1;
  if (a.kl_estimator == kK2) {
    value = 0.5f * difference * difference;
    slope = difference;
  } else if (a.kl_estimator == kK3) {
    const bool outside = difference < -10.0f || difference > 10.0f;
    const float d = difference < -10.0f ? 10.0f : difference > 10.0f ? -10.0f : -difference;
    value = expm1f(d) - d;
    slope = outside ? 0.0f : -expm1f(d);
  }
  out->kl = token.kl_scale * value;
  out->dlogprob += token.kl_scale * slope;
}

SPO_HOST_DEVICE TokenLoss token_loss(const PolicyLossArgs& a, const Token& token, bool in_policy,
                                     bool in_kl, float logprob) {
  TokenLoss loss = {};
  if (in_policy) add_policy(a, token, logprob, &loss);
  if (in_kl) add_kl(a, token, logprob, &loss);
  return loss;
}

}  // namespace spo
