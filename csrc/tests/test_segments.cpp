// Hand-worked segments: the edge cases of a partition, and malformed offsets.
#include <cmath>
#include <limits>
#include <vector>

#include "csrc/ops.h"
#include "csrc/tests/check.h"

namespace {

using Offsets = std::vector<int64_t>;

constexpr float kSure = -0.05f, kUnsure = -0.5f;  // on either side of log 0.9

struct Segments {
  int64_t count;
  Offsets cu_segments, cu_seq_segments;

  Segments(const std::vector<float>& logprobs, const Offsets& cu_seqlens, int64_t interval)
      : cu_segments(logprobs.size() + 1, -1), cu_seq_segments(cu_seqlens.size(), -1) {
    spo::SegmentsArgs args;
    args.tokens = static_cast<int64_t>(logprobs.size());
    args.seqs = static_cast<int64_t>(cu_seqlens.size()) - 1;
    args.logprobs = logprobs.data();
    args.cu_seqlens = cu_seqlens.data();
    args.log_threshold = std::log(0.9f);
    args.interval = interval;
    args.cu_segments = cu_segments.data();
    args.cu_seq_segments = cu_seq_segments.data();
    count = spo::segments_cpu(args);
    if (count >= 0) cu_segments.resize(count + 1);
  }
};

void test_cutpoints() {
  // Empty; no cutpoint; first token a cutpoint and a short last segment; late first cutpoint.
  const std::vector<float> logprobs{kSure,   kSure, kUnsure, kSure,   kUnsure,
                                    kUnsure, kSure, kSure,   kUnsure, kUnsure};
  const Segments found(logprobs, {0, 0, 2, 7, 10, 10}, 2);
  CHECK(found.count == 5);
  CHECK(found.cu_segments == Offsets({0, 2, 5, 7, 8, 10}));
  CHECK(found.cu_seq_segments == Offsets({0, 0, 1, 3, 5, 5}));

  const Segments single({kUnsure}, {0, 1}, 1);  // one token, and a buffer for just one segment
  CHECK(single.cu_segments == Offsets({0, 1}));
  const Segments every({kUnsure, kUnsure, kUnsure}, {0, 3}, 1);
  CHECK(every.cu_segments == Offsets({0, 1, 2, 3}));
  const Segments none({}, {0}, 1);
  CHECK(none.count == 0 && none.cu_segments == Offsets({0}) &&
        none.cu_seq_segments == Offsets({0}));
  const Segments strict({kSure, std::log(0.9f)}, {0, 2}, 1);
  CHECK(strict.count == 1);
}

void test_malformed_cutpoints() {
  const std::vector<float> logprobs(3, -0.5f);
  for (const Offsets& bad : {Offsets{1, 3}, {0, 2}, {0, 4}, {0, 2, 1, 3}, {0, -1, 3}, {0, 9, 3}}) {
    CHECK(Segments(logprobs, bad, 1).count == -1);
  }
  const float nan = std::numeric_limits<float>::quiet_NaN();
  CHECK(Segments({0.0f, nan}, {0, 2}, 1).count == -1);
}

bool advantages_of(const std::vector<float>& values, const Offsets& cu_segments,
                   const Offsets& cu_seq_segments, std::vector<float>& advantages) {
  spo::SegmentAdvantagesArgs args;
  args.tokens = static_cast<int64_t>(advantages.size());
  args.segments = static_cast<int64_t>(cu_segments.size()) - 1;
  args.seqs = static_cast<int64_t>(cu_seq_segments.size()) - 1;
  args.values = values.data();
  args.cu_segments = cu_segments.data();
  args.cu_seq_segments = cu_seq_segments.data();
  args.advantages = advantages.data();
  return spo::segment_advantages_cpu(args);
}

void test_advantages() {
  // Values at the boundaries: sequence 0 has 0.25, 0.5, 1; sequence 1 is empty with 7; 2 has 1, 0.
  const std::vector<float> values{0.25f, 0.5f, 1, 7, 1, 0};
  std::vector<float> advantages(6, std::numeric_limits<float>::quiet_NaN());
  CHECK(advantages_of(values, {0, 2, 3, 6}, {0, 2, 2, 3}, advantages));
  CHECK(advantages == std::vector<float>({0.25f, 0.25f, 0.5f, -1, -1, -1}));
  CHECK(!advantages_of(values, {0, 2, 3, 7}, {0, 2, 2, 3}, advantages));
  CHECK(!advantages_of(values, {0, 9, 3, 6}, {0, 2, 2, 3}, advantages));
  CHECK(!advantages_of(values, {0, 2, 3, 6}, {0, 4, 2, 3}, advantages));
}

}  // namespace

int main() {
  test_cutpoints();
  test_malformed_cutpoints();
  test_advantages();
  return spo::check::finish("test_segments");
}
