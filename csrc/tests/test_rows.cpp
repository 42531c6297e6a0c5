// The row kernels against double-precision loops, for every instruction set this host can run.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "csrc/cpu/isa.h"
#include "csrc/ops.h"
#include "csrc/tests/check.h"
#include "csrc/tests/logits.h"

namespace {

using spo::Dtype;
using spo::check::Buffer;
using spo::check::fill_logits;
using spo::check::kInf;
using spo::check::kNan;

struct RowOracle {
  double logprob, entropy;
  std::vector<double> p;
};

// `tanh_scale`: of LogprobsArgs, where the temperature is that of the tanh.
RowOracle oracle(const Buffer& x, int64_t offset, int64_t vocab, int64_t id, double temperature,
                 double tanh_scale = 0) {
  std::vector<double> z;
  for (int64_t j = 0; j < vocab; ++j) {
    const double logit = x.get(offset + j);
    z.push_back((tanh_scale == 0 ? logit : std::tanh(tanh_scale * logit)) / temperature);
  }
  double sum = 0, entropy = 0;
  const double m = *std::max_element(z.begin(), z.end());
  for (double value : z) sum += std::exp(value - m);
  RowOracle out{z[id] - m - std::log(sum), 0, {}};
  for (double value : z) {
    const double logp = value - m - std::log(sum);
    out.p.push_back(std::exp(logp));
    if (out.p.back() > 0) entropy -= out.p.back() * logp;
  }
  out.entropy = entropy;
  return out;
}

void test_policy_loss(Dtype dtype, int64_t vocab, int32_t threads, bool inplace) {
  const int64_t rows = 11;
  std::mt19937 random(static_cast<uint32_t>(vocab));
  std::normal_distribution<float> normal(0, 1);
  Buffer logits(dtype, rows * vocab), original(dtype, rows * vocab), grads(dtype, rows * vocab);
  fill_logits(&logits, rows, vocab, dtype == spo::kFloat16, &random);
  std::vector<int64_t> ids(rows);
  std::vector<float> old(rows), advantages(rows), ref(rows), temperature(rows),
      logprobs(rows, kNan);
  std::vector<float> entropy(rows, kNan), stats(spo::kStats * rows, kNan),
      scales = {0.25f, 0.05f, 0, 1.0f};
  std::vector<uint8_t> uses(rows);
  for (int64_t i = 0; i < rows; ++i) {
    ids[i] = i % 4 == 3 ? 0 : random() % vocab;
    temperature[i] = 0.5f + 0.25f * (i % 5);
    const RowOracle row = oracle(logits, i * vocab, vocab, ids[i], temperature[i]);
    old[i] = static_cast<float>(row.logprob) + 0.3f * normal(random);
    ref[i] = static_cast<float>(row.logprob) + 0.3f * normal(random);
    advantages[i] = i == 5 ? 0 : normal(random);
    uses[i] =
        (i != 2 && i != 8 ? spo::kInPolicy : 0) | (i != 5 && i != 8 ? spo::kInKl | spo::kRuns : 0);
  }
  for (int64_t j = 0; j < vocab; ++j) {  // rows 5 and 8 carry no loss: they must not be read
    logits.set(5 * vocab + j, kNan);
    logits.set(8 * vocab + j, kNan);
  }
  ids[8] = -100;
  for (int64_t i = 0; i < rows * vocab; ++i) original.set(i, static_cast<float>(logits.get(i)));

  spo::PolicyLossArgs a;
  a.tokens = a.rows = rows, a.vocab = vocab, a.dtype = dtype;
  a.logits = logits.data(), a.dlogits = inplace ? logits.data() : grads.data();
  a.logits_layout = a.dlogits_layout = {1, vocab, 0};
  a.token_ids = ids.data(), a.old_logprobs = old.data(), a.advantages = advantages.data();
  a.ref_logprobs = ref.data(), a.temperature = temperature.data(), a.temperature_stride = 1;
  a.uses = uses.data(), a.scales = scales.data();
  a.clip_eps_low = 0.2f, a.clip_eps_high = 0.3f, a.log_ratio_clamp = 10;
  a.kl_estimator = spo::kK3, a.kl_clamp = 10;
  a.logprobs = logprobs.data(), a.entropy = entropy.data(), a.stats = stats.data();
  a.num_threads = threads;
  spo::policy_loss_cpu(a);

  const Buffer& out = inplace ? logits : grads;
  for (int64_t i = 0; i < rows; ++i) {
    if (i == 5 || i == 8) {
      CHECK_NEAR(logprobs[i], kNan, 0, "dropped logprob");
      for (int64_t j = 0; j < vocab; ++j) CHECK_NEAR(out.get(i * vocab + j), 0, 0, "dropped row");
      continue;
    }
    const RowOracle row = oracle(original, i * vocab, vocab, ids[i], temperature[i]);
    CHECK_NEAR(logprobs[i], row.logprob, 4e-6 + 1e-7 * std::abs(row.logprob), "logprob");
    CHECK_NEAR(entropy[i], row.entropy, 4e-6, "entropy");
    double g = 0, policy = 0, kl = 0;
    if (uses[i] & spo::kInPolicy) {
      const double ratio = std::exp(row.logprob - old[i]);
      const double held = std::min(std::max(ratio, 1 - 0.2), 1 + 0.3);
      const bool clipped = ratio * advantages[i] > held * advantages[i];
      policy = -0.25 * (clipped ? held : ratio) * advantages[i];
      if (!clipped) g -= 0.25 * ratio * advantages[i];
    }
    if (uses[i] & spo::kInKl) {
      const double d = ref[i] - row.logprob;
      kl = 0.05 * (std::exp(d) - d - 1);
      g += 0.05 * (1 - std::exp(d));
    }
    CHECK_NEAR(stats[spo::kStats * i + spo::kPolicyTerm], policy, 1e-5 * std::abs(policy) + 1e-7,
               "policy term");
    CHECK_NEAR(stats[spo::kStats * i + spo::kKlTerm], kl, 1e-5 * std::abs(kl) + 1e-6, "KL term");
    for (int64_t j = 0; j < vocab; ++j) {
      const double want = g / temperature[i] * ((j == ids[i]) - row.p[j]);
      const double bound = 1e-6 + 1e-5 * std::abs(want) + 1.01 * out.rounding(want);
      CHECK_NEAR(out.get(i * vocab + j), want, bound, "dlogits");
    }
  }
  CHECK(logits.guard_untouched() && grads.guard_untouched());
}

// With a cap of 30 if `capped`: rows shifted by 1e4 are then flat, with gradients of 0.
void test_logprobs(Dtype dtype, int64_t vocab, bool capped) {
  const int64_t rows = 8;
  std::mt19937 random(static_cast<uint32_t>(vocab) + 1);
  Buffer logits(dtype, rows * vocab), grads(dtype, rows * vocab);
  fill_logits(&logits, rows, vocab, dtype == spo::kFloat16, &random);
  std::vector<int64_t> ids(rows);
  for (int64_t i = 0; i < rows; ++i) ids[i] = random() % vocab / 3 * 3;  // never a -inf entry
  std::vector<uint8_t> mask(rows, 1);
  mask[6] = 0, ids[6] = 1 << 30;
  const float temperature = capped ? 0.7f / 30 : 0.7f;
  std::vector<float> logprobs(rows, kNan), entropy(rows, kNan), row_max(rows), logsum(rows);
  std::vector<float> g(rows, 0.5f), h(rows, -0.25f);

  spo::LogprobsArgs a;
  a.rows = rows, a.vocab = vocab, a.dtype = dtype, a.logits = logits.data();
  a.logits_layout = a.dlogits_layout = {1, vocab, 0};
  a.token_ids = ids.data(), a.mask = mask.data(), a.temperature = &temperature;
  a.tanh_scale = capped ? 1.5f / 30 : 0;
  a.logprobs = logprobs.data(), a.entropy = entropy.data();
  a.row_max = row_max.data(), a.row_logsum = logsum.data();
  spo::logprobs_cpu(a);
  a.grad_logprobs = g.data(), a.grad_entropy = h.data(), a.dlogits = grads.data();
  spo::logprobs_backward_cpu(a);
  for (int64_t i = 0; i < rows; ++i) {
    if (!mask[i]) {
      CHECK_NEAR(logprobs[i], 0, 0, "masked logprob");
      for (int64_t j = 0; j < vocab; ++j) CHECK_NEAR(grads.get(i * vocab + j), 0, 0, "masked row");
      continue;
    }
    const RowOracle row = oracle(logits, i * vocab, vocab, ids[i], temperature, a.tanh_scale);
    const double cap = capped ? 30 : 0;  // a tanh is good to 1.7 ulp, of 2^-24 at most
    const double bound = 4e-6 + 1e-7 * std::abs(row.logprob) + 3 * 0x1p-24 * cap / 0.7;
    CHECK_NEAR(logprobs[i], row.logprob, bound, "logprob");
    CHECK_NEAR(entropy[i], row.entropy, bound, "entropy");
    CHECK(std::abs(row_max[i]) <= 1 || !capped);
    for (int64_t j = 0; j < vocab; ++j) {
      const double p = row.p[j];
      double want = 0.5 * ((j == ids[i]) - p);
      if (p > 0) want += 0.25 * p * (std::log(p) + row.entropy);
      want /= temperature;
      if (capped) {
        const double flat = 1 / std::cosh(a.tanh_scale * logits.get(i * vocab + j));
        want *= a.tanh_scale * flat * flat;
      }
      const double bound = 2e-6 + 1e-5 * std::abs(want) + 1.01 * grads.rounding(want);
      CHECK_NEAR(grads.get(i * vocab + j), want, bound, "dlogits");
    }
  }
  CHECK(grads.guard_untouched());
}

}  // namespace

int main() {
  for (spo::Isa isa : {spo::Isa::kPortable, spo::Isa::kAvx2, spo::Isa::kAvx512}) {
    if (!spo::isa_runs_here(isa)) {
      std::fprintf(stderr, "%s: not on this processor, skipped\n", spo::isa_name(isa));
      continue;
    }
    setenv("SPO_CPU_ISA", spo::isa_name(isa), 1);
    for (Dtype dtype : {spo::kFloat32, spo::kBFloat16, spo::kFloat16}) {
      for (int64_t vocab : {1, 7, 8, 33, 64, 1003, 1024, 2050, 5000}) {
        for (bool inplace : {false, true}) test_policy_loss(dtype, vocab, 1, inplace);
        test_policy_loss(dtype, vocab, 3, false);
        for (bool capped : {false, true}) test_logprobs(dtype, vocab, capped);
      }
    }
  }
  return spo::check::finish("test_rows");
}
