#pragma once
// What a token of masked_ppo_loss takes part in, the scales and the figures: shared by the CPU and
// CUDA kernels that run before and after the rows.
#include <cmath>
#include <cstdint>

#include "csrc/objective.h"
#include "csrc/ops.h"

namespace spo {

// Whether kept tokens without a policy term need their logprob too.
SPO_HOST_DEVICE bool needs_all_kept(const PolicyLossArgs& a) {
  return a.metrics || a.entropy_coef != 0 || masks_late(a);
}

SPO_HOST_DEVICE bool is_in_mask(const PolicyLossArgs& a, int64_t token) {
  if (!a.loss_mask) return true;
  if (a.mask_bytes == 1) return read_as<uint8_t>(a.loss_mask, token) != 0;
  if (a.mask_bytes == 2) return read_as<uint16_t>(a.loss_mask, token) != 0;
  if (a.mask_bytes == 4) return read_as<uint32_t>(a.loss_mask, token) != 0;
  return read_as<uint64_t>(a.loss_mask, token) != 0;
}

// The bits of `Use` that the masks decide, and whether the token is dropped because its old logprob
// is NaN. Where that is an error, NaN keeps its token. A zero advantage makes the policy term and
// its gradient 0: such a token needs no logprob for them.
struct Membership {
  uint8_t use;
  bool dropped;
};

SPO_HOST_DEVICE Membership membership(const PolicyLossArgs& a, int64_t token) {
  // All are loaded first, so that the loads run in parallel.
  const bool in_mask = is_in_mask(a, token);
  const float old = a.old_logprobs ? a.old_logprobs[token] : -INFINITY;
  const bool acts = a.advantages[token] != 0, unknown = a.drop_nan && old != old;
  const bool trained = in_mask && !unknown, kept = trained && !(old >= a.log_threshold);
  const bool in_kl = a.kl_estimator != kNoKl && (a.kl_scope == kAll ? trained : kept);
  const bool runs =
      (kept && (acts || needs_all_kept(a))) || (in_kl && (a.kl_coef > 0 || a.metrics));
  const int use = (kept ? kInPolicy : 0) | (in_kl ? kInKl : 0) | (runs ? kRuns : 0);
  return {static_cast<uint8_t>(use), in_mask && unknown};
}

// Whether a token with this use holds what the objective cannot take.
SPO_HOST_DEVICE bool is_bad(const PolicyLossArgs& a, uint8_t use, int64_t token) {
  if (!use) return false;
  const int64_t id = token_id(a, token);
  const float temperature = temperature_of(a, token);
  const float old = a.old_logprobs ? a.old_logprobs[token] : 0;
  return id < 0 || id >= a.vocab || !(temperature > 0 && temperature < INFINITY) || old != old;
}

SPO_HOST_DEVICE double norm_of(const void* given, bool is_integer, double value, double kept) {
  if (!given) return value < 0 ? kept : value;
  return is_integer ? static_cast<double>(read_as<int64_t>(given, 0)) : read_as<float>(given, 0);
}

// The policy's norm is the number of kept tokens, which is known only after the rows.
SPO_HOST_DEVICE bool norm_is_late(const PolicyLossArgs& a) {
  return masks_late(a) && !a.policy_norm && a.policy_norm_value < 0;
}

// Bounds of |d term / d logit| of a token, without the scales. No logprob is above 0, so a ratio is
// at most exp(-old_logprob); for a positive advantage clipping ends the gradient.
struct Slopes {
  float policy, kl, entropy;
};

SPO_HOST_DEVICE void raise_slopes(const PolicyLossArgs& a, uint8_t use, int64_t token,
                                  Slopes* most) {
  if (!(use & kRuns)) return;
  const float inverse = a.logit_scale / temperature_of(a, token), advantage = a.advantages[token];
  const float old = a.old_logprobs ? a.old_logprobs[token] : 0;
  const float ratio = expf(fminf(a.log_ratio_clamp, -old));
  if (use & kInPolicy) {
    const float most_ratio = advantage > 0 ? 1 + a.clip_eps_high : a.clip_ratio_max;
    const float weight = a.weights ? fabsf(a.weights[token]) : 1;
    const float slope = fabsf(advantage) * weight * fminf(ratio, most_ratio) * inverse;
    most->policy = fmaxf(most->policy, slope);
    most->entropy = fmaxf(most->entropy, (1 + logf(static_cast<float>(a.vocab))) * inverse);
  }
  if (use & kInKl) {
    const float k3 = expf(fminf(a.kl_clamp, 10));
    const float kl = a.kl_estimator == kK1 ? 1 : a.kl_estimator == kK2 ? 4096 : k3;
    const float weight = a.kl_weights ? fabsf(a.kl_weights[token]) : 1;
    most->kl = fmaxf(most->kl, kl * weight * (a.kl_ratio ? 2 * ratio : 1) * inverse);
  }
}

// The values of `scales`, after the counts. `most`: over all tokens, where gradients are scaled.
SPO_HOST_DEVICE void write_scales(const PolicyLossArgs& a, const Slopes& most) {
  const double kept = norm_is_late(a) ? 1 : static_cast<double>(a.counts[0]);
  const double z = norm_of(a.policy_norm, a.policy_norm_is_integer, a.policy_norm_value, kept);
  const double z_kl = norm_of(a.kl_norm, a.kl_norm_is_integer, a.kl_norm_value, kept);
  const bool good = z >= 0 && z < INFINITY && z_kl >= 0 && z_kl < INFINITY;
  if (!good) a.counts[3] |= kBadNorm;
  // Where nobody reads the counts, a bad norm shows in the loss.
  const double unit = good ? 1 : NAN;
  const double policy = z == 0 ? 0 : unit / z;
  const double kl = a.kl_estimator == kNoKl || z_kl == 0 ? 0 : unit * a.kl_coef / z_kl;
  a.scales[0] = static_cast<float>(policy);
  a.scales[1] = static_cast<float>(kl);
  a.scales[2] = static_cast<float>(policy * a.entropy_coef);
  a.scales[3] = 1;
  // fp16 holds 40 powers of two. The largest gradient that there can be becomes about 2^15, so that
  // those of unlikely tokens are not flushed to 0. Never smaller than they are: that would flush
  // more.
  const double size = policy * (most.policy + fabs(a.entropy_coef) * most.entropy) + kl * most.kl;
  if (a.scaled && size > 0 && size < INFINITY) {
    const int exponent = 14 - ilogb(size);
    if (exponent > 0) a.scales[3] = static_cast<float>(ldexp(1.0, exponent < 100 ? exponent : 100));
  }
}

// What a token adds to the figures: the columns of `stats`, and the counts of its use, since the
// mask of this pass may have dropped it.
struct Totals {
  double stats[kStats];
  int64_t kept, measured, in_kl;
};

SPO_HOST_DEVICE void count_use(uint8_t use, Totals* totals) {
  const bool runs = use & kRuns;
  totals->kept += (use & kInPolicy) != 0;
  totals->measured += (use & kInPolicy) && runs;
  totals->in_kl += (use & kInKl) && runs;
}

SPO_HOST_DEVICE void write_figures(const PolicyLossArgs& a, const Totals& totals) {
  a.counts[0] = totals.kept, a.counts[1] = totals.measured, a.counts[6] = totals.in_kl;
  const double late = !norm_is_late(a) ? 1 : totals.kept ? 1.0 / totals.kept : 0;
  const auto mean = [](double sum, int64_t count) {
    return static_cast<float>(count ? sum / static_cast<double>(count) : 0);
  };
  const double* sums = totals.stats;
  a.figures[0] = static_cast<float>(late * sums[kPolicyTerm]);
  a.figures[1] = static_cast<float>(late * sums[kKlTerm]);
  a.figures[2] = static_cast<float>(late * sums[kEntropyTerm]);
  a.figures[3] = mean(sums[kLow] + sums[kHigh], totals.kept);
  a.figures[4] = mean(sums[kLow], totals.kept);
  a.figures[5] = mean(sums[kHigh], totals.kept);
  a.figures[6] = mean(sums[kMax], totals.kept);
  a.figures[7] = mean(sums[kRatio], totals.measured);
  a.figures[8] = mean(sums[kKlEstimate], totals.in_kl);
  a.figures[9] = static_cast<float>(late / a.scales[3]);
  *a.loss = a.figures[0] + a.figures[1] + a.figures[2];
}

}  // namespace spo
