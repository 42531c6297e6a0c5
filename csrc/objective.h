#pragma once
// The objective of one token and its derivative by the token's logprob: the one copy that the CPU
// and CUDA kernels share. PyTorch's counterpart is token_objective in spo_kernels/objective.py.
#include <cmath>
#include <cstdint>

#include "csrc/ops.h"

namespace spo {

struct Objective {
  float clip_eps_low, clip_eps_high;
  float log_ratio_clamp;
  int32_t kl_estimator;
  float policy_scale;  // 1 / Z
  float kl_scale;      // kl_coef / Z_kl
};

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
SPO_HOST_DEVICE void add_policy(const Objective& o, float logprob, float old_logprob,
                                float advantage, TokenLoss* out) {
  const float difference = logprob - old_logprob, bound = o.log_ratio_clamp;
  const bool outside = difference < -bound || difference > bound;
  const float log_ratio = difference < -bound ? -bound : difference > bound ? bound : difference;
  const float ratio = expf(log_ratio);
  const float low = 1 - o.clip_eps_low, high = 1 + o.clip_eps_high;
  const float clipped_ratio = ratio < low ? low : ratio > high ? high : ratio;
  const bool clipped = ratio * advantage > clipped_ratio * advantage;
  out->ratio = ratio;
  out->clipped = clipped ? 1.0f : 0.0f;
  out->policy = -o.policy_scale * (clipped ? clipped_ratio : ratio) * advantage;
  if (!clipped && !outside) out->dlogprob -= o.policy_scale * ratio * advantage;
}

// k1 = p - q, k2 = (p - q)^2 / 2, k3 = exp(d) - d - 1 with d = clamp(q - p, -10, 10), for the
// logprobs p of the policy and q of the reference.
SPO_HOST_DEVICE void add_kl(const Objective& o, float logprob, float ref_logprob, TokenLoss* out) {
  const float difference = logprob - ref_logprob;
  float value = difference, slope = 1;
  if (o.kl_estimator == kK2) {
    value = 0.5f * difference * difference;
    slope = difference;
  } else if (o.kl_estimator == kK3) {
    const bool outside = difference < -10.0f || difference > 10.0f;
    const float d = difference < -10.0f ? 10.0f : difference > 10.0f ? -10.0f : -difference;
    value = expm1f(d) - d;
    slope = outside ? 0.0f : -expm1f(d);
  }
  out->kl = o.kl_scale * value;
  out->dlogprob += o.kl_scale * slope;
}

}  // namespace spo
