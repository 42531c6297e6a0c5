// The CUDA kernels over packed sequences, emulated on the host, against the CPU kernels.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "csrc/cuda/launch.cuh"
#include "csrc/ops.h"
#include "csrc/tests/check.h"
#include "csrc/tests/checked.h"

namespace {

using spo::check::run_checked;

using Offsets = std::vector<int64_t>;
constexpr float kNan = __builtin_nanf("");

// Empty sequences, short ones, and, if they are few, ones of several chunks of a block.
Offsets random_offsets(int64_t seqs, std::mt19937* random) {
  const int64_t lengths[] = {0, 1, 2, 31, 33, 512, 513, 1300};
  Offsets offsets = {0};
  for (int64_t i = 0; i < seqs; ++i)
    offsets.push_back(offsets.back() + lengths[(*random)() % (seqs < 100 ? 8 : 4)]);
  return offsets;
}

std::vector<float> random_floats(int64_t size, std::mt19937* random) {
  std::normal_distribution<float> normal(0, 1);
  std::vector<float> x(size);
  for (float& value : x) value = normal(*random);
  return x;
}

int64_t find_segments(const spo::SegmentsArgs& a) {
  return run_checked(spo::segments_workspace, spo::segments_cuda, a);
}
int64_t advance(const spo::SegmentAdvantagesArgs& a) {
  return run_checked(spo::segment_advantages_workspace, spo::segment_advantages_cuda, a);
}

const Offsets kBadOffsets[] = {{0, 2}, {1, 3}, {0, 4, 3}, {0, 2, 1, 3}, {0, -1, 3}};

void test_segments(int64_t seqs, int64_t interval, std::mt19937* random) {
  const Offsets offsets = random_offsets(seqs, random);
  const int64_t tokens = offsets.back();
  auto logprobs = random_floats(tokens, random);
  spo::SegmentsArgs a;
  a.tokens = tokens, a.seqs = seqs, a.interval = interval, a.log_threshold = -0.1f;
  a.logprobs = logprobs.data(), a.cu_seqlens = offsets.data();
  const auto run = [&](int64_t (*kernel)(const spo::SegmentsArgs&), Offsets* cu_segments,
                       Offsets* cu_seq_segments) {
    cu_segments->assign(tokens + 1, -7), cu_seq_segments->assign(seqs + 1, -7);
    a.cu_segments = cu_segments->data(), a.cu_seq_segments = cu_seq_segments->data();
    return kernel(a);
  };
  Offsets found, found_seq, want, want_seq;
  const int64_t segments = run(spo::segments_cpu, &want, &want_seq);
  CHECK(run(find_segments, &found, &found_seq) == segments);
  CHECK(found == want && found_seq == want_seq);

  const auto values = random_floats(segments + seqs, random);
  spo::SegmentAdvantagesArgs b;
  b.tokens = tokens, b.segments = segments, b.seqs = seqs, b.values = values.data();
  b.cu_segments = want.data(), b.cu_seq_segments = want_seq.data();
  std::vector<float> got_advantages(tokens, kNan), want_advantages(tokens, kNan);
  b.advantages = want_advantages.data();
  CHECK(spo::segment_advantages_cpu(b));
  b.advantages = got_advantages.data();
  CHECK(advance(b) == 0);
  CHECK(got_advantages == want_advantages);

  if (tokens == 0) return;
  logprobs[tokens / 2] = kNan;
  CHECK(run(find_segments, &found, &found_seq) == -1);
}

void test_malformed() {
  const std::vector<float> x(3, -1);
  std::vector<float> out(6);
  Offsets segments(4), seq_segments(4);
  for (const Offsets& bad : kBadOffsets) {
    std::fill(out.begin(), out.end(), 0.0f);
    const int64_t seqs = static_cast<int64_t>(bad.size()) - 1;
    spo::SegmentsArgs b;
    b.tokens = 3, b.seqs = seqs, b.logprobs = x.data(), b.cu_seqlens = bad.data();
    b.cu_segments = segments.data(), b.cu_seq_segments = seq_segments.data();
    CHECK(find_segments(b) == -1);

    for (bool inner : {false, true}) {
      spo::SegmentAdvantagesArgs c;
      c.tokens = 3, c.segments = inner ? seqs : 3, c.seqs = inner ? 1 : seqs;
      const Offsets good = inner ? Offsets{0, c.segments} : Offsets{0, 1, 2, 3};
      c.values = out.data(), c.advantages = out.data() + 3;
      c.cu_segments = inner ? bad.data() : good.data();
      c.cu_seq_segments = inner ? good.data() : bad.data();
      CHECK(advance(c) == -1);
      for (int i = 3; i < 6; ++i) CHECK(std::isnan(out[i]));
    }
  }
}

}  // namespace

int main() {
  for (bool backwards : {false, true}) {
    spo::emulation::machine.backwards = backwards;
    std::mt19937 random(backwards);
    for (int64_t seqs : {0, 1, 9}) {
      for (int round = 0; round < 2; ++round)
        for (int64_t interval : {1, 2, 5}) test_segments(seqs, interval, &random);
    }
    test_segments(520, 2, &random);  // more sequences than threads in a block
    test_malformed();
  }
  return spo::check::finish("test_cuda_packed");
}
