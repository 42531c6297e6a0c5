// Cutpoints to segments, and segment values to token advantages, over packed sequences.
#include <algorithm>
#include <cmath>

#include "csrc/cpu/offsets.h"
#include "csrc/ops.h"

namespace spo {

int64_t segments_cpu(const SegmentsArgs& args) {
  if (!are_offsets(args.cu_seqlens, args.seqs, args.tokens)) return -1;
  int64_t segments = 0;
  args.cu_seq_segments[0] = 0;
  for (int64_t seq = 0; seq < args.seqs; ++seq) {
    const int64_t begin = args.cu_seqlens[seq], end = args.cu_seqlens[seq + 1];
    if (begin < end) args.cu_segments[segments++] = begin;
    int64_t to_pass = 0;  // cutpoints before the next boundary
    for (int64_t t = begin; t < end; ++t) {
      const float logprob = args.logprobs[t];
      if (std::isnan(logprob)) return -1;
      if (logprob >= args.log_threshold) continue;
      if (to_pass == 0) {
        if (t > begin) args.cu_segments[segments++] = t;
        to_pass = args.interval;
      }
      --to_pass;
    }
    args.cu_seq_segments[seq + 1] = segments;
  }
  args.cu_segments[segments] = args.tokens;
  return segments;
}

bool segment_advantages_cpu(const SegmentAdvantagesArgs& args) {
  if (!are_offsets(args.cu_segments, args.segments, args.tokens) ||
      !are_offsets(args.cu_seq_segments, args.seqs, args.segments)) {
    return false;
  }
  for (int64_t seq = 0; seq < args.seqs; ++seq) {
    const float* values = args.values + seq;  // every sequence has one value more than segments
    for (int64_t s = args.cu_seq_segments[seq]; s < args.cu_seq_segments[seq + 1]; ++s) {
      std::fill(args.advantages + args.cu_segments[s], args.advantages + args.cu_segments[s + 1],
                values[s + 1] - values[s]);
    }
  }
  return true;
}

}  // namespace spo
