// Values, sibling statistics and advantages over a forest. Parents come before children, so one
// sweep from the last node to the first meets every child before its parent. Sums are fp64 and in
// a fixed order; the result is rounded once. One thread: at one million nodes the sweeps take
// about as long as reading their buffers.
#include <cmath>
#include <vector>

#include "csrc/ops.h"

namespace spo {
namespace {

// Per node: its number of counted children, and a sum over them.
struct ChildSums {
  std::vector<int32_t> counts;
  std::vector<double> sums;

  explicit ChildSums(int64_t nodes) : counts(nodes), sums(nodes) {}

  double mean(int64_t node) const { return sums[node] / counts[node]; }
};

bool is_parent(int64_t parent, int64_t node) { return parent >= -1 && parent < node; }

// Adds every counted node's value to its parent. False if a parent is not before its child.
template <typename Args>
bool sum_children(const Args& args, ChildSums& children) {
  for (int64_t node = 0; node < args.nodes; ++node) {
    const int64_t up = args.parent[node];
    if (!is_parent(up, node)) return false;
    if (up < 0 || !args.in_value[node]) continue;
    ++children.counts[up];
    children.sums[up] += args.values[node];
  }
  return true;
}

// Population variance of every node's counted children, NaN if there are none. It takes a second
// sweep over the deviations, so that equal values give exactly zero.
template <typename Args>
std::vector<double> child_variances(const Args& args, const ChildSums& children) {
  std::vector<double> variances(args.nodes);
  for (int64_t node = 0; node < args.nodes; ++node) {
    const int64_t up = args.parent[node];
    if (up < 0 || !args.in_value[node]) continue;
    const double deviation = args.values[node] - children.mean(up);
    variances[up] += deviation * deviation;
  }
  for (int64_t node = 0; node < args.nodes; ++node) variances[node] /= children.counts[node];
  return variances;
}

}  // namespace

bool tree_cpu(const TreeArgs& args) {
  ChildSums children(args.nodes);
  for (int64_t node = args.nodes - 1; node >= 0; --node) {
    const int64_t up = args.parent[node];
    if (!is_parent(up, node)) return false;
    double value = args.rewards[node];
    if (const int32_t count = children.counts[node]; count > 0) {
      if (!std::isnan(value)) return false;
      // A path of single children would otherwise wait for a division at every step.
      value = count == 1 ? children.sums[node] : children.mean(node);
    }
    args.values[node] = static_cast<float>(value);
    if (up < 0 || !args.in_value[node]) continue;
    ++children.counts[up];
    children.sums[up] += value;
  }
  return true;
}

bool tree_stats_cpu(const TreeStatsArgs& args) {
  ChildSums children(args.nodes);
  if (!sum_children(args, children)) return false;
  const std::vector<double> variances = child_variances(args, children);
  for (int64_t node = 0; node < args.nodes; ++node) {
    args.counts[node] = children.counts[node];
    args.variances[node] = static_cast<float>(variances[node]);
  }
  return true;
}

bool tree_advantages_cpu(const TreeAdvantagesArgs& args) {
  const bool siblings = args.leave_one_out || args.scale_by_std;
  ChildSums children(siblings ? args.nodes : 0);
  if (siblings && !sum_children(args, children)) return false;
  std::vector<double> variances;
  if (args.scale_by_std) variances = child_variances(args, children);
  for (int64_t node = 0; node < args.nodes; ++node) {
    const int64_t up = args.parent[node];
    if (!is_parent(up, node)) return false;
    if (up < 0) {
      args.advantages[node] = 0.0f;
      continue;
    }
    const double value = args.values[node];
    double baseline = args.values[up];
    if (args.leave_one_out) {
      if (!args.in_value[node]) return false;
      const int32_t others = children.counts[up] - 1;
      baseline = others == 0 ? value : (children.sums[up] - value) / others;
    }
    double advantage = value - baseline;
    if (args.scale_by_std) advantage /= std::sqrt(variances[up]) + args.eps;
    args.advantages[node] = static_cast<float>(advantage);
  }
  return true;
}

}  // namespace spo
