// Generalised advantage estimation over packed sequences: one backward sweep each, in fp64.
#include "csrc/cpu/offsets.h"
#include "csrc/ops.h"

namespace spo {

bool gae_cpu(const GaeArgs& args) {
  if (!are_offsets(args.cu_seqlens, args.seqs, args.tokens)) return false;
  const double decay = args.gamma * args.lam;
  for (int64_t seq = 0; seq < args.seqs; ++seq) {
    double next_value = args.bootstrap_values ? args.bootstrap_values[seq] : 0.0;
    double advantage = 0.0;
    for (int64_t t = args.cu_seqlens[seq + 1] - 1; t >= args.cu_seqlens[seq]; --t) {
      const double value = args.values[t];
      advantage = args.rewards[t] + args.gamma * next_value - value + decay * advantage;
      args.advantages[t] = static_cast<float>(advantage);
      args.returns[t] = static_cast<float>(advantage + value);
      next_value = value;
    }
  }
  return true;
}

}  // namespace spo
