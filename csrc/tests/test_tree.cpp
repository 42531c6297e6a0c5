// Hand-worked forests: a 2-2 tree with an early leaf, a chain with probes, and malformed input.
#include <limits>
#include <vector>

#include "csrc/ops.h"
#include "csrc/tests/check.h"

namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

struct Forest {
  std::vector<int32_t> parent;
  std::vector<float> rewards;
  std::vector<uint8_t> in_value;

  int64_t nodes() const { return static_cast<int64_t>(parent.size()); }
};

// Writes the values; false if the forest is malformed.
bool values_of(const Forest& forest, std::vector<float>& values) {
  values.assign(forest.nodes(), kNaN);
  spo::TreeArgs args;
  args.nodes = forest.nodes();
  args.parent = forest.parent.data();
  args.rewards = forest.rewards.data();
  args.in_value = forest.in_value.data();
  args.values = values.data();
  return spo::tree_cpu(args);
}

bool advantages_of(const Forest& forest, const std::vector<float>& values, bool leave_one_out,
                   bool scale_by_std, std::vector<float>& advantages) {
  advantages.assign(forest.nodes(), kNaN);
  spo::TreeAdvantagesArgs args;
  args.nodes = forest.nodes();
  args.parent = forest.parent.data();
  args.values = values.data();
  args.in_value = forest.in_value.data();
  args.leave_one_out = leave_one_out;
  args.scale_by_std = scale_by_std;
  args.eps = 1e-8;
  args.advantages = advantages.data();
  return spo::tree_advantages_cpu(args);
}

void expect(const std::vector<float>& found, const std::vector<float>& want, const char* what) {
  if (!CHECK(found.size() == want.size())) return;
  for (size_t i = 0; i < found.size(); ++i) CHECK_NEAR(found[i], want[i], 1e-6, what);
}

// Root 0 has children 1 and 2; 1 has leaves 3 and 4; 2 ended early with a reward of 1.
const Forest kTree{{-1, 0, 0, 1, 1}, {kNaN, kNaN, 1, 1, 0}, {0, 1, 1, 1, 1}};

// Trunk 0 -> 2 -> 5, trained but not counted; probes 1, 3, 4 are counted.
const Forest kChain{{-1, 0, 0, 2, 2, 2}, {kNaN, 1, kNaN, 0, 1, 1}, {0, 1, 0, 1, 1, 0}};

void test_values() {
  std::vector<float> values;
  CHECK(values_of(kTree, values));
  expect(values, {0.75f, 0.5f, 1, 1, 0}, "2-2 tree");
  CHECK(values_of(kChain, values));
  expect(values, {1, 1, 0.5f, 0, 1, 1}, "chain");
  CHECK(values_of({{-1}, {kNaN}, {1}}, values));
  expect(values, {kNaN}, "nothing counted");
  // A counted child without a value leaves none to its parent; its sibling does not stand in.
  CHECK(values_of({{-1, 0, 0}, {kNaN, 1, kNaN}, {0, 1, 1}}, values));
  expect(values, {kNaN, 1, kNaN}, "child without a value");
  CHECK(values_of({}, values));
}

void test_stats() {
  const std::vector<float> values{0.75f, 0.5f, 1, 1, 0};
  std::vector<int32_t> counts(5, -1);
  std::vector<float> variances(5, -1.0f);
  spo::TreeStatsArgs args;
  args.nodes = 5;
  args.parent = kTree.parent.data();
  args.values = values.data();
  args.in_value = kTree.in_value.data();
  args.counts = counts.data();
  args.variances = variances.data();
  CHECK(spo::tree_stats_cpu(args));
  CHECK(counts == std::vector<int32_t>({2, 2, 0, 0, 0}));
  expect(variances, {0.0625f, 0.25f, kNaN, kNaN, kNaN}, "variances");
}

void test_advantages() {
  const std::vector<float> values{0.75f, 0.5f, 1, 1, 0};
  std::vector<float> advantages;
  CHECK(advantages_of(kTree, values, false, false, advantages));
  expect(advantages, {0, -0.25f, 0.25f, 0.5f, -0.5f}, "parent");
  CHECK(advantages_of(kTree, values, true, false, advantages));
  expect(advantages, {0, -0.5f, 0.5f, 1, -1}, "leave one out");
  CHECK(advantages_of(kTree, values, false, true, advantages));
  expect(advantages, {0, -1, 1, 1, -1}, "std");
  CHECK(!advantages_of(kChain, {1, 1, 0.5f, 0, 1, 1}, true, false, advantages));
  // Equal rewards that are no binary fraction: exactly zero, not the rounding of a mean.
  const Forest star{{-1, 0, 0, 0}, {kNaN, 0.1f, 0.1f, 0.1f}, {0, 1, 1, 1}};
  CHECK(advantages_of(star, {0.1f, 0.1f, 0.1f, 0.1f}, true, true, advantages));
  CHECK(advantages == std::vector<float>(4, 0.0f));
  CHECK(advantages_of({{-1, 0}, {kNaN, 1}, {0, 1}}, {1, 1}, true, false, advantages));
  CHECK(advantages == std::vector<float>(2, 0.0f));  // an only child
}

void test_malformed() {
  std::vector<float> out;
  const std::vector<std::vector<int32_t>> parents{{-1, 1}, {-1, 2}, {-2, 0}, {0, 0}, {-1, 1 << 30}};
  for (const auto& parent : parents) {
    const Forest forest{parent, {kNaN, 1}, {1, 1}};
    CHECK(!values_of(forest, out));
    for (bool option : {false, true}) CHECK(!advantages_of(forest, {0, 0}, option, option, out));
  }
  CHECK(!values_of({{-1, 0}, {1, 1}, {0, 1}}, out));  // a reward above a counted child
  CHECK(values_of({{-1, 0}, {1, 1}, {0, 0}}, out));   // the child does not count
}

}  // namespace

int main() {
  test_values();
  test_stats();
  test_advantages();
  test_malformed();
  return spo::check::finish("test_tree");
}
