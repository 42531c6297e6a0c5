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

SPO_HOST_DEVICE bool is_trained(const PolicyLossArgs& a, int64_t token) {
  if (!a.loss_mask) return true;
  if (a.mask_bytes == 1) return read_as<uint8_t>(a.loss_mask, token) != 0;
  if (a.mask_bytes == 2) return read_as<uint16_t>(a.loss_mask, token) != 0;
  if (a.mask_bytes == 4) return read_as<uint32_t>(a.loss_mask, token) != 0;
  return read_as<uint64_t>(a.loss_mask, token) != 0;
}

// The bits of `Use` that the masks decide. An old logprob of NaN keeps its token: it is an error.
SPO_HOST_DEVICE uint8_t token_use(const PolicyLossArgs& a, int64_t token) {
  const bool trained = is_trained(a, token), unsure = !(a.old_logprobs[token] >= a.log_threshold);
  const bool kept = trained && unsure;  // both are loaded first, so that the loads run in parallel
  const bool in_kl = a.kl_estimator != kNoKl && (a.kl_scope == kAll ? trained : kept);
  return static_cast<uint8_t>((kept ? kInPolicy : 0) | (in_kl ? kInKl : 0));
}

// A zero advantage makes the policy term and its gradient 0: such a token needs no logprob.
SPO_HOST_DEVICE bool has_policy(const PolicyLossArgs& a, uint8_t use, int64_t token) {
  return (use & kInPolicy) && a.advantages[token] != 0;
}

// Whether a token with this use holds what the objective cannot take.
SPO_HOST_DEVICE bool is_bad(const PolicyLossArgs& a, uint8_t use, int64_t token) {
  if (!use) return false;
  const int64_t id = token_id(a, token);
  const float temperature = temperature_of(a, token), old = a.old_logprobs[token];
  return id < 0 || id >= a.vocab || !(temperature > 0 && temperature < INFINITY) || old != old;
}

SPO_HOST_DEVICE double norm_of(const void* given, bool is_integer, double value, int64_t kept) {
  if (!given) return value < 0 ? static_cast<double>(kept) : value;
  return is_integer ? static_cast<double>(read_as<int64_t>(given, 0)) : read_as<float>(given, 0);
}

// Bounds of |d term / d logit| of a token, without the scales. No logprob is above 0, so a ratio is
// at most exp(-old_logprob); for a positive advantage clipping ends the gradient.
struct Slopes {
  float policy, kl;
};

SPO_HOST_DEVICE void raise_slopes(const PolicyLossArgs& a, uint8_t use, int64_t token,
                                  Slopes* most) {
  const float temperature = temperature_of(a, token), advantage = a.advantages[token];
  if ((use & kInPolicy) && advantage != 0) {
    float ratio = expf(fminf(a.log_ratio_clamp, -a.old_logprobs[token]));
    if (advantage > 0) ratio = fminf(ratio, 1 + a.clip_eps_high);
    most->policy = fmaxf(most->policy, fabsf(advantage) * ratio / temperature);
  }
  const float kl = a.kl_estimator == kK1 ? 1 : a.kl_estimator == kK2 ? 4096 : 22027;
  if (use & kInKl) most->kl = fmaxf(most->kl, kl / temperature);
}

// The values of `scales`, after the counts. `most`: over all tokens, where gradients are scaled.
SPO_HOST_DEVICE void write_scales(const PolicyLossArgs& a, int64_t kept, const Slopes& most) {
  const double z = norm_of(a.policy_norm, a.policy_norm_is_integer, a.policy_norm_value, kept);
  const double z_kl = norm_of(a.kl_norm, a.kl_norm_is_integer, a.kl_norm_value, kept);
  const bool good = z >= 0 && z < INFINITY && z_kl >= 0 && z_kl < INFINITY;
  if (!good) a.counts[3] |= kBadNorm;
  const double policy = z == 0 ? 0 : 1 / z;
  const double kl = a.kl_estimator == kNoKl || z_kl == 0 ? 0 : a.kl_coef / z_kl;
  a.scales[0] = static_cast<float>(policy);
  a.scales[1] = static_cast<float>(kl);
  a.scales[2] = 1;
  // fp16 holds 40 powers of two. The largest gradient that there can be becomes about 2^15, so that
  // those of unlikely tokens are not flushed to 0. Never smaller than they are: that would flush
  // more.
  const double size = policy * most.policy + kl * most.kl;
  if (a.scaled && size > 0 && size < INFINITY) {
    const int exponent = 14 - ilogb(size);
    if (exponent > 0) a.scales[2] = static_cast<float>(ldexp(1.0, exponent < 100 ? exponent : 100));
  }
  a.figures[4] = 1 / a.scales[2];
}

// What the record shows, from the sums of `stats`.
SPO_HOST_DEVICE void write_figures(const PolicyLossArgs& a, const double (&sums)[4]) {
  const double count = a.counts[1] > 0 ? static_cast<double>(a.counts[1]) : 1.0;
  a.figures[0] = static_cast<float>(sums[0]);
  a.figures[1] = static_cast<float>(sums[1]);
  a.figures[2] = static_cast<float>(sums[2] / count);
  a.figures[3] = static_cast<float>(sums[3] / count);
  *a.loss = a.figures[0] + a.figures[1];
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
