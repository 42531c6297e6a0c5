// The CUDA kernels over forests, emulated on the host, against the CPU kernels: equal to the last
// bit, in whatever order the threads run.
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
using spo::emulation::machine;
using Floats = std::vector<float>;
constexpr float kNan = __builtin_nanf("");

struct Forest {
  std::vector<int32_t> parent;
  Floats rewards;
  std::vector<uint8_t> in_value;

  int64_t nodes() const { return static_cast<int64_t>(parent.size()); }
};

bool is_nan(float x) { return std::isnan(x); }

bool same(const Floats& found, const Floats& want) {
  return std::equal(found.begin(), found.end(), want.begin(), want.end(),
                    [](float a, float b) { return a == b || (std::isnan(a) && std::isnan(b)); });
}

bool all_nan(const Floats& x) { return std::all_of(x.begin(), x.end(), is_nan); }

template <class Args>
Args args_of(const Forest& forest) {
  Args a;
  a.nodes = forest.nodes(), a.parent = forest.parent.data(), a.in_value = forest.in_value.data();
  return a;
}

// Random rewards where a value is not a mean; some are unknown if `unknown`. Many are large and
// cancel, so that a sum shows the order in which it was taken.
void add_rewards(Forest* forest, bool unknown, std::mt19937* random) {
  std::normal_distribution<float> normal(0, 1);
  forest->rewards.resize(forest->nodes());
  for (float& reward : forest->rewards) {
    const uint32_t kind = (*random)() % 8;
    reward = kind < 2               ? 0x1p80f
             : kind < 4             ? -0x1p80f
             : kind == 4 && unknown ? kNan
                                    : normal(*random);
  }
  for (int64_t node = 0; node < forest->nodes(); ++node)
    if (forest->parent[node] >= 0 && forest->in_value[node])
      forest->rewards[forest->parent[node]] = kNan;
}

// A node hangs under one of the `reach` nodes before it, or it is a root; `counted` of 8 count.
Forest random_forest(int64_t nodes, int64_t reach, uint32_t counted, std::mt19937* random) {
  Forest forest;
  for (int64_t node = 0; node < nodes; ++node) {
    const int64_t up = node - 1 - static_cast<int64_t>((*random)() % reach);
    forest.parent.push_back((*random)() % 50 ? static_cast<int32_t>(std::max<int64_t>(up, -1))
                                             : -1);
    forest.in_value.push_back((*random)() % 8 < counted);
  }
  add_rewards(&forest, counted < 8, random);
  return forest;
}

Forest star(int64_t nodes, std::mt19937* random) {
  Forest forest{std::vector<int32_t>(nodes, 0), {}, std::vector<uint8_t>(nodes, 1)};
  forest.parent[0] = -1;
  add_rewards(&forest, false, random);
  return forest;
}

void test_forest(const Forest& forest) {
  const int64_t nodes = forest.nodes();
  auto a = args_of<spo::TreeArgs>(forest);
  a.rewards = forest.rewards.data();
  Floats want(nodes, 7), found(nodes, 7);
  a.values = want.data();
  CHECK(spo::tree_cpu(a));
  a.values = found.data();
  CHECK(run_checked(spo::tree_workspace, spo::tree_cuda, a) == 0);
  CHECK(same(found, want));

  auto b = args_of<spo::TreeStatsArgs>(forest);
  b.values = want.data();
  Floats variances(nodes, 7), want_variances(nodes, 7);
  std::vector<int32_t> counts(nodes, -7), want_counts(nodes, -7);
  b.counts = want_counts.data(), b.variances = want_variances.data();
  CHECK(spo::tree_stats_cpu(b));
  b.counts = counts.data(), b.variances = variances.data();
  CHECK(run_checked(spo::tree_stats_workspace, spo::tree_stats_cuda, b) == 0);
  CHECK(counts == want_counts && same(variances, want_variances));

  auto c = args_of<spo::TreeAdvantagesArgs>(forest);
  c.values = want.data(), c.eps = 1e-8;
  Floats advantages(nodes), want_advantages(nodes);
  for (int options = 0; options < 4; ++options) {
    c.leave_one_out = options & 1, c.scale_by_std = options & 2;
    c.advantages = want_advantages.data();
    const bool good = spo::tree_advantages_cpu(c);
    std::fill(advantages.begin(), advantages.end(), 7.0f);
    c.advantages = advantages.data();
    const int64_t result =
        run_checked(spo::tree_advantages_workspace, spo::tree_advantages_cuda, c);
    CHECK(result == (good ? 0 : -1));
    CHECK(good ? same(advantages, want_advantages) : all_nan(advantages));
  }
}

// All outputs of a malformed forest are NaN: inside a CUDA graph nobody reads the result.
void test_bad_parents(const Forest& forest) {
  const int64_t nodes = forest.nodes();
  const Floats values(nodes, 0.5f);
  Floats out(nodes, 7);
  auto a = args_of<spo::TreeArgs>(forest);
  a.rewards = forest.rewards.data(), a.values = out.data();
  CHECK(run_checked(spo::tree_workspace, spo::tree_cuda, a) == -1 && all_nan(out));

  auto b = args_of<spo::TreeStatsArgs>(forest);
  std::vector<int32_t> counts(nodes, -7);
  out.assign(nodes, 7);
  b.values = values.data(), b.counts = counts.data(), b.variances = out.data();
  CHECK(run_checked(spo::tree_stats_workspace, spo::tree_stats_cuda, b) == -1 && all_nan(out));
  CHECK(counts == std::vector<int32_t>(nodes, -1));

  auto c = args_of<spo::TreeAdvantagesArgs>(forest);
  c.values = values.data(), c.advantages = out.data();
  for (int options = 0; options < 4; ++options) {
    c.leave_one_out = options & 1, c.scale_by_std = options & 2;
    out.assign(nodes, 7);
    CHECK(run_checked(spo::tree_advantages_workspace, spo::tree_advantages_cuda, c) == -1);
    CHECK(all_nan(out));
  }
}

void test_malformed(std::mt19937* random) {
  const Forest good = random_forest(600, 9, 8, random);
  for (int64_t node : {0, 1, 300, 599}) {
    for (int64_t bad :
         {node, node + 1, int64_t{600}, int64_t{1} << 30, int64_t{-2}, -(int64_t{1} << 31)}) {
      Forest forest = good;
      forest.parent[node] = static_cast<int32_t>(bad);
      test_bad_parents(forest);
    }
  }
  // A reward on a node with counted children, found on the way up.
  Forest forest = good;
  const int32_t inner = *std::max_element(good.parent.begin(), good.parent.end());
  forest.rewards[inner] = 1;
  Floats out(forest.nodes(), 7);
  auto a = args_of<spo::TreeArgs>(forest);
  a.rewards = forest.rewards.data(), a.values = out.data();
  CHECK(run_checked(spo::tree_workspace, spo::tree_cuda, a) == -1 && all_nan(out));
}

void test_all(std::mt19937* random) {
  test_forest({});
  for (int64_t nodes : {1, 2, 256, 257, 1500}) {
    test_forest(star(nodes, random));
    for (int64_t reach : {1, 2, 7, 1500})  // 1: paths
      for (uint32_t counted : {0, 5, 8}) test_forest(random_forest(nodes, reach, counted, random));
  }
  test_malformed(random);
}

}  // namespace

int main() {
  std::mt19937 random(0);
  for (int blocks : {1, 4}) {
    machine.resident_blocks = blocks;
    for (bool backwards : {false, true}) {
      machine.backwards = backwards;
      test_all(&random);
    }
    machine.random_order = true;
    test_all(&random);
    machine.random_order = false;
  }
  return spo::check::finish("test_cuda_tree");
}
