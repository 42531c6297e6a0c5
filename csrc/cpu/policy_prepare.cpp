// What masked_ppo_loss does before and after its rows, on the CPU: a token costs a few nanoseconds,
// a row microseconds, so one thread does it.
#include <algorithm>
#include <cmath>

#include "csrc/objective.h"
#include "csrc/ops.h"

namespace spo {

namespace {

// Takes a used token into `index` and `states`, if there is room.
void take_token(const PolicyLossArgs& a, int64_t token, int64_t slot) {
  const int64_t state = a.hidden_index ? a.hidden_index[token] : token;
  const bool known = state >= 0 && state < a.num_states;
  if (!known) a.counts[3] |= kBadState;
  if (!known) a.uses[token] |= kLost;
  if (slot >= a.capacity) return;
  a.index[slot] = token;
  a.states[slot] = known ? state : a.num_states;
  a.sources[slot] = known ? state : 0;
}

}  // namespace

void policy_prepare_cpu(const PolicyLossArgs& a) {
  int64_t kept = 0, with_policy = 0, used = 0;
  Slopes most = {};
  a.counts[3] = 0;
  for (int64_t i = 0; i < a.tokens; ++i) {
    const uint8_t use = a.uses[i] = token_use(a, i);
    const bool policy = has_policy(a, use, i), takes = policy || (use & kInKl);
    kept += use & kInPolicy;
    with_policy += policy;
    if (a.scaled) raise_slopes(a, use, i, &most);
    if (is_bad(a, use, i)) a.counts[3] |= kBadToken;
    if (a.index) {  // rows of other tokens are not run
      a.logprobs[i] = 0;
      if (a.entropy) a.entropy[i] = 0;
      std::fill_n(a.stats + 4 * i, 4, 0.0f);
      if (takes) take_token(a, i, used);
    }
    used += takes;
  }
  a.counts[0] = kept, a.counts[1] = with_policy, a.counts[2] = used;
  a.counts[4] = a.index && used > a.capacity;
  if (a.index && !a.strict) {
    for (int64_t slot = used; slot < a.capacity; ++slot)
      a.index[slot] = a.tokens, a.states[slot] = a.num_states, a.sources[slot] = 0;
  }
  write_scales(a, kept, most);
}

void policy_finish_cpu(const PolicyLossArgs& a) {
  double sums[4] = {};
  for (int64_t i = 0; i < 4 * a.tokens; ++i) sums[i % 4] += a.stats[i];
  write_figures(a, sums);
}

void policy_step_cpu(const PolicyLossArgs& a) {
  policy_prepare_cpu(a);
  if (a.strict && a.counts[3]) return;
  policy_loss_cpu(a);
  policy_finish_cpu(a);
}

}  // namespace spo
