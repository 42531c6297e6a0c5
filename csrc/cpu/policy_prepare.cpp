// What masked_ppo_loss does before and after its rows, on the CPU: a token costs a few nanoseconds,
// a row microseconds, so one thread does it.
#include <algorithm>
#include <cmath>

#include "csrc/ops.h"
#include "csrc/prepare.h"

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
  int64_t kept = 0, runs = 0, dropped = 0;
  Slopes most = {};
  a.counts[3] = 0;
  for (int64_t i = 0; i < a.tokens; ++i) {
    const Membership token = membership(a, i);
    a.uses[i] = token.use;
    kept += token.use & kInPolicy;
    dropped += token.dropped;
    if (a.scaled) raise_slopes(a, token.use, i, &most);
    if (is_bad(a, token.use, i)) a.counts[3] |= kBadToken;
    if (a.index) {  // rows of other tokens are not run
      a.logprobs[i] = NAN;
      if (a.entropy) a.entropy[i] = NAN;
      std::fill_n(a.stats + kStats * i, kStats, 0.0f);
      if (token.use & kRuns) take_token(a, i, runs);
    }
    runs += (token.use & kRuns) != 0;
  }
  a.counts[0] = kept, a.counts[2] = runs, a.counts[5] = dropped;
  a.counts[4] = a.index && runs > a.capacity;
  if (a.index && !a.strict) {
    for (int64_t slot = runs; slot < a.capacity; ++slot)
      a.index[slot] = a.tokens, a.states[slot] = a.num_states, a.sources[slot] = 0;
  }
  write_scales(a, most);
}

void policy_finish_cpu(const PolicyLossArgs& a) {
  Totals totals = {};
  for (int64_t i = 0; i < a.tokens; ++i) {
    count_use(a.uses[i], &totals);
    for (int k = 0; k < kStats; ++k) totals.stats[k] += a.stats[kStats * i + k];
  }
  write_figures(a, totals);
}

void policy_step_cpu(const PolicyLossArgs& a) {
  policy_prepare_cpu(a);
  if (a.strict && a.counts[3]) return;
  policy_loss_cpu(a);
  policy_finish_cpu(a);
}

}  // namespace spo
