// Hand-worked advantages of packed sequences, one of them empty, and malformed offsets.
#include <limits>
#include <vector>

#include "csrc/ops.h"
#include "csrc/tests/check.h"

namespace {

const std::vector<float> kRewards{0, 1, 2}, kValues{0.5f, 0.25f, 1};

struct Result {
  bool ok;
  std::vector<float> advantages, returns;

  Result(const std::vector<int64_t>& cu_seqlens, double gamma, double lam, const float* bootstrap)
      : advantages(3, std::numeric_limits<float>::quiet_NaN()), returns(advantages) {
    spo::GaeArgs args;
    args.tokens = 3;
    args.seqs = static_cast<int64_t>(cu_seqlens.size()) - 1;
    args.rewards = kRewards.data();
    args.values = kValues.data();
    args.cu_seqlens = cu_seqlens.data();
    args.bootstrap_values = bootstrap;
    args.gamma = gamma;
    args.lam = lam;
    args.advantages = advantages.data();
    args.returns = returns.data();
    ok = spo::gae_cpu(args);
  }

  void expect(const std::vector<float>& want) const {
    CHECK(ok);
    for (size_t t = 0; t < want.size(); ++t) {
      CHECK_NEAR(advantages[t], want[t], 1e-6, "advantage");
      CHECK_NEAR(returns[t], want[t] + kValues[t], 1e-6, "return");
    }
  }
};

}  // namespace

int main() {
  // Sequence 0 holds two tokens, 1 none, 2 one.
  // gamma = lam = 1: the sum of rewards to come, minus the value.
  Result({0, 2, 2, 3}, 1, 1, nullptr).expect({0.5f, 0.75f, 1});
  // gamma = 0.5, lam = 0.5: deltas -0.375 and 0.75, decay 0.25.
  Result({0, 2, 2, 3}, 0.5, 0.5, nullptr).expect({-0.1875f, 0.75f, 1});
  // Bootstrapped with 2, (unused) and 4: deltas -0.375, 1.75 and 3.
  const std::vector<float> bootstrap{2, 9, 4};
  Result({0, 2, 2, 3}, 0.5, 0.5, bootstrap.data()).expect({0.0625f, 1.75f, 3});
  for (const std::vector<int64_t>& bad :
       {std::vector<int64_t>{0, 2}, {1, 3}, {0, 4, 3}, {0, 2, 1, 3}, {0, -1, 3}}) {
    CHECK(!Result(bad, 1, 1, nullptr).ok);
  }
  return spo::check::finish("test_gae");
}
