// The CUDA kernels, emulated on the host, against the CPU kernels on the same arguments.
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "csrc/cuda/held_row.cuh"
#include "csrc/ops.h"
#include "csrc/tests/check.h"
#include "csrc/tests/logits.h"

namespace {

using spo::Dtype;
using spo::check::Buffer;
using spo::check::kInf;
using spo::check::kNan;
using spo::emulation::machine;
using spo::emulation::runtime;

constexpr int64_t kRows = 7;

// How the kernels run: on a cluster of at least this many blocks (0: no clusters), in which order.
struct Mode {
  int cluster;
  bool backwards;

  // Leaves just enough shared memory for plan_held_row to choose the cluster.
  void set(int64_t row_bytes) const {
    runtime.clusters = cluster > 0;
    machine.backwards = backwards;
    const int64_t granules = spo::ceil_div(row_bytes / 16, std::max(cluster, 1));
    const int64_t block = sizeof(spo::HeldRowMemory) + granules * 16 + 1024;
    runtime.shared_per_multiprocessor = spo::kHeldBlocks * block;
  }
};

// Rows in blocks of three with gaps between rows and between blocks; no two are aligned alike.
struct Layout {
  int64_t vocab;
  spo::RowLayout rows() const { return {3, 3 * (vocab + 3) + 2, vocab + 3}; }
  int64_t offset(int64_t row) const { return spo::row_offset(rows(), row); }
  int64_t size() const { return offset(kRows); }
};

void fill(Buffer* x, const Layout& layout, bool half, std::mt19937* random) {
  Buffer dense(spo::kFloat32, kRows * layout.vocab);
  spo::check::fill_logits(&dense, kRows, layout.vocab, half, random);
  for (int64_t i = 0; i < kRows; ++i)
    for (int64_t j = 0; j < layout.vocab; ++j)
      x->set(layout.offset(i) + j, static_cast<float>(dense.get(i * layout.vocab + j)));
}

void near_rows(const std::vector<float>& found, const std::vector<float>& want, double bound,
               const char* what) {
  for (size_t i = 0; i < want.size(); ++i)
    CHECK_NEAR(found[i], want[i], bound + 1e-5 * std::abs(want[i]), what);
}

// Everywhere, so that a write between two rows is seen too. Both results were rounded.
void near_grads(const Buffer& found, const Buffer& want, int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    const double x = want.get(i);
    CHECK_NEAR(found.get(i), x, 2e-6 + 1e-5 * std::abs(x) + 2.02 * want.rounding(x), "dlogits");
  }
}

struct Outputs {
  std::vector<float> logprobs, entropy, stats;
  Outputs() : logprobs(kRows, kNan), entropy(kRows, kNan), stats(spo::kStats * kRows, kNan) {}
};

enum class Out { kFresh, kSameAlignment, kInplace, kNone };

// kAll: an entropy bonus, weights, a maximal ratio, the ratio in the KL term. kCapped: that and a
// soft cap. kLate: on-policy, with the probability mask of this pass, and a scale of the logits.
enum class Options { kPlain, kAll, kCapped, kLate };

void test_policy_loss(Dtype dtype, Dtype grads_dtype, int64_t vocab, Mode mode, Out where,
                      bool entropy, Options options = Options::kPlain) {
  std::mt19937 random(static_cast<uint32_t>(vocab));
  std::normal_distribution<float> normal(0, 1);
  const Layout layout{vocab};
  Buffer logits(dtype, layout.size());
  fill(&logits, layout, dtype == spo::kFloat16, &random);
  std::vector<int64_t> ids(kRows);
  std::vector<float> old(kRows), advantages(kRows), ref(kRows), temperature(kRows);
  std::vector<uint8_t> uses(kRows, spo::kInPolicy | spo::kInKl | spo::kRuns);
  float scales[4] = {0.25f, 0.05f, 0, 1};
  int64_t counts[7] = {};
  for (int64_t i = 0; i < kRows; ++i) {
    ids[i] = i % 4 == 3 ? 0 : i == 4 ? vocab - 1 : random() % vocab;
    temperature[i] = 0.5f + 0.25f * (i % 5);
    old[i] = -3 + normal(random), ref[i] = -3 + normal(random), advantages[i] = normal(random);
  }
  // Row 2 has no policy term; rows 1 and 5 carry no loss: they must not be read.
  uses[0] = spo::kInPolicy | spo::kRuns, uses[1] = spo::kInPolicy, uses[5] = 0;
  uses[2] = spo::kInKl | spo::kRuns, advantages[1] = 0;
  ids[5] = -100;
  for (int64_t j = 0; j < vocab; ++j)
    for (int64_t i : {1, 5}) logits.set(layout.offset(i) + j, kNan);
  Buffer copy = logits, grads(grads_dtype, layout.size()), want_grads(grads_dtype, layout.size());

  spo::PolicyLossArgs a;
  a.tokens = a.rows = kRows, a.vocab = vocab, a.dtype = dtype, a.logits_layout = layout.rows();
  a.dlogits_dtype = grads_dtype;
  a.dlogits_layout = where == Out::kFresh ? spo::RowLayout{1, vocab, 0} : layout.rows();
  a.token_ids = ids.data(), a.old_logprobs = old.data(), a.advantages = advantages.data();
  a.ref_logprobs = ref.data(), a.temperature = temperature.data(), a.temperature_stride = 1;
  a.uses = uses.data(), a.scales = scales, a.counts = counts;
  a.clip_eps_low = 0.2f, a.clip_eps_high = 0.3f, a.log_ratio_clamp = 10;
  a.kl_estimator = spo::kK3, a.kl_clamp = 10;
  std::vector<float> weights(kRows), kl_weights(kRows);
  for (int64_t i = 0; i < kRows; ++i) weights[i] = 0.3f * i, kl_weights[i] = 2 - 0.3f * i;
  if (options != Options::kPlain) a.kl_ratio = true, a.kl_scope = spo::kAll;
  if (options == Options::kCapped) a.logit_scale = 0.5f, a.logit_softcap = 3;
  if (options == Options::kAll || options == Options::kCapped) {
    a.entropy_coef = 0.4, scales[2] = 0.1f, a.clip_ratio_max = 1.5f;
    a.weights = weights.data(), a.kl_weights = kl_weights.data();
  } else if (options == Options::kLate) {
    a.old_logprobs = nullptr, a.log_threshold = -4, a.logit_scale = 0.5f;
  }
  const std::vector<uint8_t> uses_before = uses;
  std::vector<uint8_t> want_uses;
  Outputs found, want;
  const auto run = [&](void (*kernel)(const spo::PolicyLossArgs&), Outputs* out, Buffer* x,
                       Buffer* dx) {
    a.logits = x->data();
    a.dlogits = where == Out::kNone ? nullptr : where == Out::kInplace ? x->data() : dx->data();
    a.logprobs = out->logprobs.data(), a.stats = out->stats.data();
    a.entropy = entropy ? out->entropy.data() : nullptr;
    kernel(a);
  };
  run(spo::policy_loss_cpu, &want, &copy, &want_grads);
  want_uses = uses, uses = uses_before, a.uses = uses.data();
  mode.set(vocab * logits.width());
  run(spo::policy_loss_cuda, &found, &logits, &grads);
  const int64_t granules = vocab * logits.width() / 16;
  const bool holds = where != Out::kNone && mode.cluster > 0 &&
                     (options == Options::kPlain || options == Options::kLate);
  if (holds && granules >= mode.cluster * mode.cluster)
    CHECK(runtime.launches.back().cluster == mode.cluster);
  near_rows(found.logprobs, want.logprobs, 4e-6, "logprob");
  near_rows(found.entropy, want.entropy, 8e-6, "entropy");
  near_rows(found.stats, want.stats, 2e-6, "stats");
  CHECK(uses == want_uses);
  const Buffer& out = where == Out::kInplace ? logits : grads;
  near_grads(out, where == Out::kInplace ? copy : want_grads, layout.size());
  CHECK(logits.guard_untouched() && grads.guard_untouched());
  if (where == Out::kNone) return;
  for (int64_t i : {1, 5})
    for (int64_t j = 0; j < vocab; ++j)
      CHECK_NEAR(out.get(spo::row_offset(a.dlogits_layout, i) + j), 0, 0, "dropped row");
}

void test_logprobs(Dtype dtype, Dtype grads_dtype, int64_t vocab, bool backwards, bool entropy,
                   bool capped) {
  std::mt19937 random(static_cast<uint32_t>(vocab) + 1);
  const Layout layout{vocab};
  Buffer logits(dtype, layout.size());
  fill(&logits, layout, dtype == spo::kFloat16, &random);
  std::vector<int64_t> ids(kRows);
  for (int64_t i = 0; i < kRows; ++i) ids[i] = random() % vocab / 3 * 3;  // never a -inf entry
  std::vector<uint8_t> mask(kRows, 1);
  mask[6] = 0, ids[6] = 1 << 30;
  const float temperature = capped ? 0.7f / 30 : 0.7f;
  std::vector<float> g(kRows, 0.5f), h(kRows, -0.25f);
  g[2] = h[2] = 0, h[4] = 0;
  Buffer grads(grads_dtype, layout.size()), want_grads(grads_dtype, layout.size());

  spo::LogprobsArgs a;
  a.rows = kRows, a.vocab = vocab, a.dtype = dtype, a.logits = logits.data();
  a.logits_layout = a.dlogits_layout = layout.rows(), a.dlogits_dtype = grads_dtype;
  a.token_ids = ids.data(), a.mask = mask.data(), a.temperature = &temperature;
  a.tanh_scale = capped ? 1.5f / 30 : 0;
  Outputs found, want;
  const auto run = [&](void (*forward)(const spo::LogprobsArgs&),
                       void (*backward)(const spo::LogprobsArgs&), Outputs* out, Buffer* dx) {
    a.logprobs = out->logprobs.data(), a.row_max = out->stats.data();
    a.row_logsum = out->stats.data() + kRows;
    a.entropy = entropy ? out->entropy.data() : nullptr;
    forward(a);
    a.grad_logprobs = g.data(), a.grad_entropy = entropy ? h.data() : nullptr;
    a.dlogits = dx->data();
    backward(a);
  };
  run(spo::logprobs_cpu, spo::logprobs_backward_cpu, &want, &want_grads);
  machine.backwards = backwards;
  run(spo::logprobs_cuda, spo::logprobs_backward_cuda, &found, &grads);
  const double more = capped ? 4 * 0x1p-24 * 30 / 0.7 : 0;  // both tanhs are good to 1.7 ulp
  near_rows(found.logprobs, want.logprobs, 4e-6 + more, "logprob");
  near_rows(found.entropy, want.entropy, 8e-6 + more, "entropy");
  near_rows(found.stats, want.stats, 4e-6, "maximum and log of the sum");
  near_grads(grads, want_grads, layout.size());
}

// Ids outside the vocabulary and NaN logits make a kept row NaN, and only that row.
void test_bad_rows(Mode mode) {
  const int64_t vocab = 300;
  std::vector<float> logits(kRows * vocab, 0.5f), dlogits(kRows * vocab, kNan);
  logits[2 * vocab + 299] = kNan;
  const int64_t ids[kRows] = {0, -1, 7, vocab, int64_t{1} << 40, 299, 5};
  const std::vector<float> zeros(kRows), ones(kRows, 1);
  std::vector<uint8_t> uses(kRows, spo::kInPolicy | spo::kRuns);
  float scales[4] = {1, 0, 0, 1};
  Outputs out;
  spo::PolicyLossArgs a;
  a.tokens = a.rows = kRows, a.vocab = vocab, a.logits = logits.data(), a.dlogits = dlogits.data();
  a.logits_layout = a.dlogits_layout = {1, vocab, 0};
  a.token_ids = ids, a.old_logprobs = zeros.data(), a.advantages = ones.data();
  a.temperature = ones.data(), a.uses = uses.data(), a.scales = scales;
  a.clip_eps_low = a.clip_eps_high = 1, a.log_ratio_clamp = 10;
  a.logprobs = out.logprobs.data(), a.stats = out.stats.data();
  mode.set(vocab * 4);
  spo::policy_loss_cuda(a);
  Outputs alone;
  spo::LogprobsArgs b;
  b.rows = kRows, b.vocab = vocab, b.logits = logits.data(), b.logits_layout = {1, vocab, 0};
  b.token_ids = ids, b.temperature = ones.data(), b.logprobs = alone.logprobs.data();
  b.row_max = alone.stats.data(), b.row_logsum = alone.stats.data() + kRows;
  spo::logprobs_cuda(b);
  for (int64_t i = 0; i < kRows; ++i) {
    const bool good = i == 0 || i >= 5;
    CHECK_NEAR(out.logprobs[i], good ? -std::log(300.0) : kNan, 1e-6, "logprob");
    CHECK_NEAR(alone.logprobs[i], good ? -std::log(300.0) : kNan, 1e-6, "logprob alone");
    CHECK(std::isnan(out.stats[spo::kStats * i]) == !good);
    CHECK(std::isnan(dlogits[i * vocab]) == !good);
  }
}

}  // namespace

int main() {
  for (Dtype dtype : {spo::kFloat32, spo::kBFloat16, spo::kFloat16}) {
    for (int64_t vocab : {1, 7, 8, 37, 300, 1003, 5000}) {
      for (int cluster : {0, 1, 2, 4, 8, 16}) {
        const bool odd = (vocab + cluster) % 2;
        for (Out where : {Out::kFresh, Out::kSameAlignment, Out::kInplace, Out::kNone})
          test_policy_loss(dtype, dtype, vocab, {cluster, odd}, where, where != Out::kFresh);
        test_policy_loss(dtype, dtype, vocab, {cluster, !odd}, Out::kInplace, false);
        for (Options options : {Options::kAll, Options::kCapped})
          test_policy_loss(dtype, dtype, vocab, {cluster, odd}, Out::kInplace, true, options);
        test_policy_loss(dtype, dtype, vocab, {cluster, odd}, Out::kInplace, odd, Options::kLate);
        if (dtype != spo::kFloat32) continue;
        for (Out where : {Out::kFresh, Out::kSameAlignment})
          test_policy_loss(dtype, spo::kBFloat16, vocab, {cluster, odd}, where, false);
      }
      for (bool backwards : {false, true}) {
        for (bool capped : {false, true}) {
          test_logprobs(dtype, dtype, vocab, backwards, backwards != capped, capped);
          if (dtype == spo::kFloat32)
            test_logprobs(dtype, spo::kBFloat16, vocab, backwards, backwards, capped);
        }
      }
    }
  }
  test_policy_loss(spo::kBFloat16, spo::kBFloat16, 151936, {4, false}, Out::kInplace, true);
  for (int cluster : {0, 1, 2, 4, 8, 16})
    for (bool backwards : {false, true}) test_bad_rows({cluster, backwards});
  return spo::check::finish("test_cuda_rows");
}
