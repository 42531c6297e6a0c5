// The phases of masked_ppo_loss before and after its rows: numbers worked by hand, then the CUDA
// kernels, emulated, against the CPU's on random tokens.
#include <cstdint>
#include <random>
#include <vector>

#include "csrc/cuda/row.cuh"
#include "csrc/ops.h"
#include "csrc/tests/check.h"
#include "csrc/tests/logits.h"

namespace {

using spo::check::kInf;
using spo::check::kNan;

struct Inputs {
  std::vector<int64_t> ids, hidden_index;
  std::vector<int32_t> mask;
  std::vector<float> old, advantages, temperature;
};

struct Results {
  std::vector<uint8_t> uses;
  std::vector<float> logprobs, stats, scales, figures;
  std::vector<int64_t> counts, index, states, sources;
  float loss = kNan;

  explicit Results(size_t n)
      : uses(n, 99),
        logprobs(n, kNan),
        stats(spo::kStats * n, kNan),
        scales(4, kNan),
        figures(10, kNan),
        counts(7, -7),
        index(n + 2, -7),
        states(n + 2, -7),
        sources(n + 2, -7) {}
};

spo::PolicyLossArgs arguments(const Inputs& in, Results* out, bool gathers) {
  spo::PolicyLossArgs a;
  a.tokens = static_cast<int64_t>(in.ids.size()), a.vocab = 10;
  a.token_ids = in.ids.data(), a.old_logprobs = in.old.data(), a.advantages = in.advantages.data();
  a.loss_mask = in.mask.data(), a.mask_bytes = 4;
  a.temperature = in.temperature.data(), a.temperature_stride = 1;
  a.log_threshold = -0.1f;
  a.uses = out->uses.data(), a.scales = out->scales.data(), a.counts = out->counts.data();
  a.logprobs = out->logprobs.data(), a.stats = out->stats.data();
  a.loss = &out->loss, a.figures = out->figures.data();
  if (!gathers) return a;
  a.index = out->index.data(), a.states = out->states.data(), a.sources = out->sources.data();
  a.hidden_index = in.hidden_index.data(), a.num_states = 5;
  a.capacity = static_cast<int64_t>(out->index.size());
  return a;
}

using Phase = void (*)(const spo::PolicyLossArgs&);

// The bits of a token that runs, for short.
constexpr uint8_t kPolicyRow = spo::kInPolicy | spo::kRuns, kKlRow = spo::kInKl | spo::kRuns;

// Token 0 trains; 1 has no advantage; 2 was sure; 3 is masked; 4 trains, with a ratio far away.
const Inputs kByHand = {{1, 2, 3, -100, 9},        {4, 4, 0, -1, 2},    {1, 7, -1, 0, 1},
                        {-1, -1, -0.1f, kNan, -2}, {2, 0, 5, kNan, -8}, {1, 1, 1, 0, 0.5f}};

void test_by_hand(Phase prepare, Phase finish) {
  Results out(5);
  spo::PolicyLossArgs a = arguments(kByHand, &out, true);
  a.kl_estimator = spo::kK3, a.kl_scope = spo::kAll, a.kl_coef = 0.5, a.kl_norm_value = 4;
  a.kl_clamp = 10, a.entropy_coef = 0;
  prepare(a);
  CHECK((out.uses == std::vector<uint8_t>{11, 11, 10, 0, 11}));
  CHECK((std::vector<int64_t>{out.counts[0], out.counts[2], out.counts[3], out.counts[4]} ==
         std::vector<int64_t>{3, 4, 0, 0}));
  CHECK((out.index == std::vector<int64_t>{0, 1, 2, 4, 5, 5, 5}));
  CHECK((out.states == std::vector<int64_t>{4, 4, 0, 2, 5, 5, 5}));
  CHECK((out.sources == std::vector<int64_t>{4, 4, 0, 2, 0, 0, 0}));
  for (float x : out.logprobs) CHECK(std::isnan(x));
  CHECK_NEAR(out.scales[0], 1.0 / 3, 1e-7, "1 / Z");
  CHECK_NEAR(out.scales[1], 0.125, 0, "kl_coef / Z_kl");
  CHECK_NEAR(out.scales[2], 0, 0, "entropy_coef / Z");
  CHECK_NEAR(out.scales[3], 1, 0, "power");
  // At most 8 / 0.5 / 3 + 22027 / 0.5 / 8 = 5512, in [2^12, 2^13); with a ratio of e^2 the same.
  a.scaled = true, a.log_ratio_clamp = 10;
  prepare(a);
  CHECK_NEAR(out.scales[3], 4, 0, "power");
  a.policy_norm_value = 1e-6;  // never smaller than the gradients are
  prepare(a);
  CHECK_NEAR(out.scales[3], 1, 0, "power");
  for (int i = 0; i < 5 * spo::kStats; ++i) out.stats[i] = static_cast<float>(i % spo::kStats + 1);
  out.scales[3] = 4;
  finish(a);
  // Five tokens left 1 to 8 each; three are kept and run, and four have a KL.
  const double want[10] = {5, 10, 15, 65.0 / 3, 10, 35.0 / 3, 40.0 / 3, 20.0 / 3, 25.0 / 4, 0.25};
  for (int i = 0; i < 10; ++i) CHECK_NEAR(out.figures[i], want[i], 2e-6, "figure");
  CHECK((out.counts == std::vector<int64_t>{3, 3, 4, 0, 0, 0, 4}));
  CHECK_NEAR(out.loss, 30, 0, "loss");
}

// What the options add to the tokens that run, to the counts and to the scales.
void test_options(Phase prepare, Phase finish) {
  Results out(5);
  spo::PolicyLossArgs a = arguments(kByHand, &out, true);
  prepare(a);  // token 1 has no term
  CHECK((out.uses == std::vector<uint8_t>{kPolicyRow, spo::kInPolicy, 0, 0, kPolicyRow}));
  CHECK(out.counts[2] == 2);
  a.kl_estimator = spo::kK1;  // a figure of the rows that run anyway
  prepare(a);
  CHECK((out.uses == std::vector<uint8_t>{kPolicyRow | spo::kInKl, 3, 0, 0, 11}));
  a.kl_estimator = spo::kNoKl, a.metrics = true;
  prepare(a);
  CHECK((out.uses == std::vector<uint8_t>{kPolicyRow, kPolicyRow, 0, 0, kPolicyRow}));
  a.metrics = false, a.entropy_coef = 0.5;
  prepare(a);
  CHECK((out.uses == std::vector<uint8_t>{kPolicyRow, kPolicyRow, 0, 0, kPolicyRow}));
  CHECK_NEAR(out.scales[2], 0.5 / 3, 1e-7, "entropy_coef / Z");
  a.entropy_coef = 0, a.drop_nan = true, a.kl_estimator = spo::kK1, a.kl_scope = spo::kAll;
  a.kl_coef = 1;
  Inputs unknown = kByHand;
  unknown.old[0] = kNan;
  a.old_logprobs = unknown.old.data();
  prepare(a);
  CHECK((out.uses == std::vector<uint8_t>{0, 11, kKlRow, 0, 11}));
  CHECK(out.counts[0] == 2 && out.counts[3] == 0 && out.counts[5] == 1);
  a.drop_nan = false;
  prepare(a);
  CHECK(out.counts[3] == spo::kBadToken && out.counts[5] == 0);
  // On-policy the rows decide; here they drop token 4, and Z becomes the 3 that are left.
  a.old_logprobs = nullptr, a.kl_estimator = spo::kNoKl, a.kl_coef = 0;
  prepare(a);
  CHECK((out.uses == std::vector<uint8_t>{9, 9, 9, 0, 9}) && out.counts[2] == 4);
  CHECK_NEAR(out.scales[0], 1, 0, "1 / Z before the rows");
  out.uses[4] = spo::kRuns;
  for (float& x : out.stats) x = 3;
  finish(a);
  CHECK(out.counts[0] == 3 && out.counts[1] == 3);
  CHECK_NEAR(out.figures[0], 15.0 / 3, 1e-6, "policy");
  CHECK_NEAR(out.figures[9], 1.0 / 3, 1e-7, "1 / Z after the rows");
  CHECK_NEAR(out.loss, 15, 1e-6, "loss");
  a.policy_norm_value = 8;
  prepare(a);
  finish(a);
  CHECK_NEAR(out.scales[0], 0.125, 0, "1 / Z");
  CHECK_NEAR(out.figures[9], 1, 0, "nothing is left to divide by");
}

// A weight, a maximal ratio and the ratio of the KL bound an fp16 gradient too.
void test_power(Phase prepare) {
  const std::vector<float> weights(5, 0.25f), kl_weights(5, 2);
  Results out(5);
  spo::PolicyLossArgs a = arguments(kByHand, &out, true);
  a.scaled = true, a.policy_norm_value = 1, a.clip_ratio_max = 3;
  const auto power = [&](double size) {
    prepare(a);
    CHECK_NEAR(out.scales[3], std::ldexp(1.0, 14 - std::ilogb(size)), 0, "power");
  };
  power(8 * 3 / 0.5);  // token 4: A = -8, temperature 1/2
  a.weights = weights.data();
  power(8 * 3 / 0.5 / 4);
  a.entropy_coef = -4;
  power(8 * 3 / 0.5 / 4 + 4 * (1 + std::log(10)) / 0.5);
  a.entropy_coef = 0, a.kl_estimator = spo::kK3, a.kl_coef = 1, a.kl_clamp = 2, a.kl_norm_value = 1;
  power(8 * 3 / 0.5 / 4 + std::exp(2.0) / 0.5);
  a.kl_weights = kl_weights.data(), a.kl_ratio = true;
  power(8 * 3 / 0.5 / 4 + std::exp(2.0) / 0.5 * 2 * 2 * std::exp(2.0));
}

// What each of them may not hold where a token is kept; masked tokens hold anything.
void test_bad_tokens(Phase prepare) {
  const Inputs good = {{1, -5}, {0, -9}, {1, 0}, {-1, kNan}, {1, kNan}, {1, kNan}};
  const auto found = [&](const Inputs& in, int64_t capacity) {
    Results out(2);
    spo::PolicyLossArgs a = arguments(in, &out, true);
    a.capacity = capacity;
    prepare(a);
    CHECK(out.counts[4] == (capacity == 0));
    return out.counts[3];
  };
  CHECK(found(good, 2) == 0);
  CHECK(found(good, 0) == 0);
  int64_t seven = 7;
  Results integer(2);
  spo::PolicyLossArgs b = arguments(good, &integer, false);
  b.policy_norm = &seven, b.policy_norm_is_integer = true;
  prepare(b);
  CHECK_NEAR(integer.scales[0], 1.0 / 7, 1e-8, "1 / Z of an integer");
  for (int64_t id : {int64_t{-1}, int64_t{10}, int64_t{1} << 40}) {
    Inputs in = good;
    in.ids[0] = id;
    CHECK(found(in, 2) == spo::kBadToken);
  }
  for (float temperature : {0.0f, -1.0f, kInf, kNan}) {
    Inputs in = good;
    in.temperature[0] = temperature;
    CHECK(found(in, 2) == spo::kBadToken);
  }
  Inputs in = good;
  in.old[0] = kNan;
  CHECK(found(in, 2) == spo::kBadToken);
  for (float norm : {-1.0f, kInf, kNan}) {
    Results out(2);
    spo::PolicyLossArgs a = arguments(good, &out, true);
    a.policy_norm = &norm;
    prepare(a);
    CHECK(out.counts[3] == spo::kBadNorm);
  }
  for (int64_t state : {-1, 5}) {
    in = good;
    in.hidden_index[0] = state;
    CHECK(found(in, 2) == spo::kBadState);
  }
}

void test_random(size_t size, bool gathers, bool strict) {
  std::mt19937 random(static_cast<uint32_t>(size));
  Inputs in;
  for (size_t i = 0; i < size; ++i) {
    in.ids.push_back(random() % 10), in.hidden_index.push_back(random() % 6);  // 5 is no state
    in.mask.push_back(random() % 3), in.old.push_back(-0.001f * (random() % 200));
    in.advantages.push_back(static_cast<float>(random() % 3) - 1), in.temperature.push_back(1);
  }
  Results want(size), found(size);
  for (Results* out : {&want, &found}) {
    spo::PolicyLossArgs a = arguments(in, out, gathers);
    a.strict = strict, a.scaled = true;
    const bool on_cpu = out == &want;
    (on_cpu ? spo::policy_prepare_cpu : spo::policy_prepare_cuda)(a);
    std::mt19937 again(7);
    for (float& x : out->stats) x = static_cast<float>(again() % 1000);
    (on_cpu ? spo::policy_finish_cpu : spo::policy_finish_cuda)(a);
  }
  CHECK(want.uses == found.uses && want.counts == found.counts);
  CHECK(want.index == found.index && want.states == found.states);
  CHECK(want.sources == found.sources);
  CHECK(want.scales == found.scales && want.figures == found.figures && want.loss == found.loss);
  if (gathers) CHECK(std::isnan(found.logprobs.empty() ? kNan : found.logprobs.back()));
}

// Rows without tokens, and rows of tokens without a hidden state.
void test_gathered_rows(Phase rows) {
  const Inputs in = {{1, 2, 3}, {0, 0, 0}, {1, 1, 1}, {-1, -1, -1}, {1, 1, 1}, {1, 1, 1}};
  Results out(3);
  out.uses = {kPolicyRow, 0, kPolicyRow | spo::kLost}, out.scales = {1, 0, 0, 1};
  out.index = {2, 3, 0, 3, 3}, out.counts = {2, 2, 2, 0, 0, 0, 0};
  std::vector<float> logits(3 * 10, 0), dlogits(3 * 10, kNan);
  spo::PolicyLossArgs a = arguments(in, &out, true);
  a.rows = 3, a.logits = logits.data(), a.dlogits = dlogits.data();
  a.logits_layout = a.dlogits_layout = {1, 10, 0};
  a.clip_eps_low = a.clip_eps_high = 1, a.log_ratio_clamp = 10;
  rows(a);
  CHECK_NEAR(out.logprobs[0], -std::log(10.0), 1e-6, "logprob");
  CHECK(std::isnan(out.logprobs[1]));  // no row belongs to it, so nothing wrote it
  CHECK(std::isnan(out.logprobs[2]) && std::isnan(dlogits[0]));
  for (int j = 0; j < 10; ++j) {
    CHECK_NEAR(dlogits[10 + j], 0, 0, "row without a token");
    const double g = -std::exp(1.0) / 10;
    CHECK_NEAR(dlogits[20 + j], g * ((j == 1) - 0.1), 1e-6, "dlogits");
  }
  a.strict = true, out.counts[3] = spo::kBadToken;
  dlogits.assign(30, 7);
  rows(a);
  if (rows == spo::policy_loss_cuda) CHECK(dlogits == std::vector<float>(30, 7));
}

// Rows of any alignment, with gaps that stay as they are.
void test_scale(spo::Dtype dtype, int64_t vocab, float factor, const float* unscale) {
  const int64_t rows = 3, stride = vocab + 3;
  spo::check::Buffer x(dtype, rows * stride);
  for (int64_t i = 0; i < rows * stride; ++i) x.set(i, static_cast<float>(i % 13) - 6);
  spo::ScaleArgs a;
  a.rows = rows, a.vocab = vocab, a.grad = x.data(), a.dtype = dtype, a.layout = {1, stride, 0};
  a.factor = &factor, a.unscale = unscale;
  spo::scale_cuda(a);
  for (int64_t i = 0; i < rows * stride; ++i) {
    const double was = static_cast<double>(i % 13) - 6;
    const double product = static_cast<double>(factor) * (unscale ? *unscale : 1);
    const double want = i % stride < vocab ? was * product : was;
    CHECK_NEAR(x.get(i), want, 1e-7 * std::abs(want) + 1.01 * x.rounding(want), "scaled");
  }
  CHECK(x.guard_untouched());
}

}  // namespace

int main() {
  for (bool clusters : {false, true}) {
    spo::emulation::runtime.clusters = clusters;
    test_gathered_rows(spo::policy_loss_cuda);
  }
  test_gathered_rows(spo::policy_loss_cpu);
  test_by_hand(spo::policy_prepare_cpu, spo::policy_finish_cpu);
  test_by_hand(spo::policy_prepare_cuda, spo::policy_finish_cuda);
  test_options(spo::policy_prepare_cpu, spo::policy_finish_cpu);
  test_options(spo::policy_prepare_cuda, spo::policy_finish_cuda);
  test_power(spo::policy_prepare_cpu);
  test_power(spo::policy_prepare_cuda);
  test_bad_tokens(spo::policy_prepare_cpu);
  test_bad_tokens(spo::policy_prepare_cuda);
  for (size_t size : {0, 1, 31, 4095, 4097, 9000})
    for (bool gathers : {false, true})
      for (bool strict : {false, true}) test_random(size, gathers, strict);
  const float half = 0.5f;
  for (spo::Dtype dtype : {spo::kFloat32, spo::kBFloat16, spo::kFloat16})
    for (int64_t vocab : {1, 9, 1000, 40000})
      for (float factor : {1.0f, -0.3f, 2.0f})
        for (const float* unscale : {static_cast<const float*>(nullptr), &half})
          test_scale(dtype, vocab, factor, unscale);
  return spo::check::finish("test_cuda_prepare");
}
