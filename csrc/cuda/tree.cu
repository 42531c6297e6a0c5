// Values, sibling statistics and advantages over a forest, on CUDA. A stable sort by parent makes
// child lists; every node's children are then summed by one thread in the order of the CPU kernel,
// in fp64. Values climb: a thread starts at every node without counted children and goes on to the
// parent if it is the last of the counted siblings to arrive. Which thread that is varies, but the
// sums do not. One thread does all work for a star of many children or for a long path; the trees
// of rollouts are neither.
#include <cmath>
#include <cub/device/device_radix_sort.cuh>

#include "csrc/cuda/launch.cuh"
#include "csrc/ops.h"

namespace spo {
namespace {

// Counted children of node n: nodes[begin[n]] .. nodes[end[n]], in ascending order.
struct Children {
  const int32_t* nodes;
  const int32_t* begin;
  const int32_t* end;

  __device__ int32_t count(int64_t node) const { return end[node] - begin[node]; }
};

__global__ void check_parents(const int32_t* parent, int64_t nodes, int32_t* malformed) {
  const int64_t node = thread_item();
  if (node < nodes && (parent[node] < -1 || parent[node] >= node)) *malformed = 1;
}

// Sort keys: the parent of a counted child; behind all of them, `nodes` for other nodes.
__global__ void make_keys(const int32_t* parent, const uint8_t* in_value, int64_t nodes,
                          uint32_t* keys, int32_t* items, const int32_t* malformed) {
  const int64_t node = thread_item();
  if (node >= nodes || *malformed) return;
  const bool counted = parent[node] >= 0 && in_value[node];
  keys[node] = static_cast<uint32_t>(counted ? parent[node] : nodes);
  items[node] = static_cast<int32_t>(node);
}

// begin and end come zeroed, for nodes without children.
__global__ void find_children(const uint32_t* keys, int64_t nodes, int32_t* begin, int32_t* end,
                              const int32_t* malformed) {
  const int64_t i = thread_item();
  if (i >= nodes || *malformed || keys[i] >= nodes) return;
  if (i == 0 || keys[i - 1] != keys[i]) begin[keys[i]] = static_cast<int32_t>(i);
  if (i + 1 == nodes || keys[i + 1] != keys[i]) end[keys[i]] = static_cast<int32_t>(i + 1);
}

// The child lists of a forest; they mean nothing if a parent is not before its child.
class ChildLists {
 public:
  ChildLists(const CheckedLaunch& run, const int32_t* parent, const uint8_t* in_value,
             int64_t nodes)
      : items_(nodes, run.stream()), ranges_(2 * nodes, run.stream()), nodes_(nodes) {
    void* const stream = run.stream();
    Workspace<uint32_t> keys(2 * nodes, stream);
    Workspace<int32_t> unsorted(nodes, stream);
    uint32_t* sorted_keys = keys.get() + nodes;
    run.threads(make_keys, nodes, parent, in_value, nodes, keys.get(), unsorted.get());
    int bits = 1;
    while (nodes >> bits) ++bits;
    size_t bytes = 0;
    const auto sort = [&](void* workspace) {
      check_cuda(cub::DeviceRadixSort::SortPairs(
                     workspace, bytes, keys.get(), sorted_keys, unsorted.get(), items_.get(),
                     static_cast<int>(nodes), 0, bits, static_cast<cudaStream_t>(stream)),
                 "sort by parent");
    };
    sort(nullptr);
    Workspace<char> workspace(static_cast<int64_t>(bytes), stream);
    sort(workspace.get());
    ranges_.clear(2 * nodes);
    run.threads(find_children, nodes, sorted_keys, nodes, ranges_.get(), ranges_.get() + nodes);
  }

  Children get() const { return {items_.get(), ranges_.get(), ranges_.get() + nodes_}; }

 private:
  Workspace<int32_t> items_, ranges_;
  int64_t nodes_;
};

// `arrived` is, for every node, the number of counted children whose value is ready; the last of
// them computes the node. `values` are their values, in fp64. Returning early is safe, as no thread
// waits for another: once `malformed` is set, all results are ignored.
__global__ void climb(const __grid_constant__ TreeArgs a, Children children, int32_t* arrived,
                      double* values, int32_t* malformed) {
  int64_t node = thread_item();
  if (node >= a.nodes || *malformed || children.count(node) > 0) return;
  double value = a.rewards[node];
  for (;;) {
    a.values[node] = static_cast<float>(value);
    const int64_t up = a.parent[node];
    if (up < 0 || !a.in_value[node]) return;
    values[node] = value;
    __threadfence();  // the value must be visible before the count
    const int32_t count = children.count(up);
    if (atomicAdd(&arrived[up], 1) + 1 < count) return;
    __threadfence();
    node = up;
    if (!isnan(a.rewards[node])) *malformed = 1;
    double sum = 0;
    for (int32_t i = children.end[node] - 1; i >= children.begin[node]; --i)
      sum += __ldcg(&values[children.nodes[i]]);  // not from an L1 line older than the value
    value = sum / count;
  }
}

// Sums over the counted children of every node; null outputs are not wanted.
struct ChildStats {
  int32_t* counts;
  double* sums;
  double* variances;
};

// Two sweeps over the values, so that equal values give a variance of exactly zero. The variance
// is NaN where there are no children.
__global__ void sum_children(const float* values, int64_t nodes, Children children,
                             ChildStats stats, const int32_t* malformed) {
  const int64_t node = thread_item();
  if (node >= nodes || *malformed) return;
  const int32_t begin = children.begin[node], end = children.end[node];
  double sum = 0, variance = 0;
  for (int32_t i = begin; i < end; ++i) sum += values[children.nodes[i]];
  const double mean = sum / (end - begin);
  for (int32_t i = begin; i < end; ++i) {
    const double deviation = values[children.nodes[i]] - mean;
    variance += deviation * deviation;
  }
  stats.counts[node] = end - begin;
  stats.sums[node] = sum;
  stats.variances[node] = variance / (end - begin);
}

__global__ void round_variances(const double* variances, int64_t nodes, float* out,
                                const int32_t* malformed) {
  const int64_t node = thread_item();
  if (node < nodes && !*malformed) out[node] = static_cast<float>(variances[node]);
}

__global__ void advance_nodes(const __grid_constant__ TreeAdvantagesArgs a, ChildStats children,
                              int32_t* malformed) {
  const int64_t node = thread_item();
  if (node >= a.nodes || *malformed) return;
  const int64_t up = a.parent[node];
  if (up < 0) {
    a.advantages[node] = 0;
    return;
  }
  const double value = a.values[node];
  double baseline = a.values[up];
  if (a.leave_one_out) {
    if (!a.in_value[node]) *malformed = 1;
    const int32_t others = children.counts[up] - 1;
    baseline = others == 0 ? value : (children.sums[up] - value) / others;
  }
  double advantage = value - baseline;
  if (a.scale_by_std) advantage /= sqrt(children.variances[up]) + a.eps;
  a.advantages[node] = static_cast<float>(advantage);
}

}  // namespace

bool tree_cuda(const TreeArgs& args) {
  if (args.nodes == 0) return true;
  const CheckedLaunch run(args.stream);
  run.threads(check_parents, args.nodes, args.parent, args.nodes);
  const ChildLists children(run, args.parent, args.in_value, args.nodes);
  Workspace<int32_t> arrived(args.nodes, args.stream);
  arrived.clear(args.nodes);
  const Workspace<double> values(args.nodes, args.stream);
  run.threads(climb, args.nodes, args, children.get(), arrived.get(), values.get());
  return run.is_well_formed();
}

bool tree_stats_cuda(const TreeStatsArgs& args) {
  if (args.nodes == 0) return true;
  const CheckedLaunch run(args.stream);
  run.threads(check_parents, args.nodes, args.parent, args.nodes);
  const ChildLists children(run, args.parent, args.in_value, args.nodes);
  const Workspace<double> moments(2 * args.nodes, args.stream);
  double* variances = moments.get() + args.nodes;
  run.threads(sum_children, args.nodes, args.values, args.nodes, children.get(),
              ChildStats{args.counts, moments.get(), variances});
  run.threads(round_variances, args.nodes, variances, args.nodes, args.variances);
  return run.is_well_formed();
}

bool tree_advantages_cuda(const TreeAdvantagesArgs& args) {
  if (args.nodes == 0) return true;
  const CheckedLaunch run(args.stream);
  run.threads(check_parents, args.nodes, args.parent, args.nodes);
  const int64_t known = args.leave_one_out || args.scale_by_std ? args.nodes : 0;
  const Workspace<int32_t> counts(known + 1, args.stream);
  const Workspace<double> moments(2 * known + 1, args.stream);
  const ChildStats stats = {counts.get(), moments.get(), moments.get() + known};
  if (known) {
    const ChildLists children(run, args.parent, args.in_value, args.nodes);
    run.threads(sum_children, args.nodes, args.values, args.nodes, children.get(), stats);
  }
  run.threads(advance_nodes, args.nodes, args, stats);
  return run.is_well_formed();
}

}  // namespace spo
