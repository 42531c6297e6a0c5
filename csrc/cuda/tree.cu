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

// What the ops keep in their workspace. The pieces of the child lists are empty if `listed` is 0.
struct Space {
  int64_t* result;
  int32_t *arrived, *begin, *end;
  int64_t zeroed;  // bytes up to here, with all of the above
  int32_t *items, *unsorted;
  uint32_t *keys, *sorted_keys;
  double *first, *second;  // of every listed node
  size_t sort_bytes = 0;
  void* sort;
  int64_t bytes;

  Space(void* workspace, int64_t listed) {
    Pieces pieces(workspace);
    result = pieces.take<int64_t>(1);
    arrived = pieces.take<int32_t>(listed);
    begin = pieces.take<int32_t>(listed);
    end = pieces.take<int32_t>(listed);
    zeroed = pieces.bytes();
    items = pieces.take<int32_t>(listed);
    unsorted = pieces.take<int32_t>(listed);
    keys = pieces.take<uint32_t>(listed);
    sorted_keys = pieces.take<uint32_t>(listed);
    first = pieces.take<double>(listed);
    second = pieces.take<double>(listed);
    sort = nullptr;
    if (listed > 0) sort_by_parent(listed, nullptr);
    sort = pieces.take<char>(static_cast<int64_t>(sort_bytes));
    bytes = pieces.bytes();
  }

  Children children() const { return {items, begin, end}; }

  // Without its own piece it sets sort_bytes, what the sort needs.
  void sort_by_parent(int64_t nodes, void* stream) {
    int bits = 1;
    while (nodes >> bits) ++bits;
    check_cuda(cub::DeviceRadixSort::SortPairs(sort, sort_bytes, keys, sorted_keys, unsorted, items,
                                               static_cast<int>(nodes), 0, bits,
                                               static_cast<cudaStream_t>(stream)),
               "sort by parent");
  }
};

Space make_space(const TreeArgs& a) { return {a.workspace, a.nodes}; }
Space make_space(const TreeStatsArgs& a) { return {a.workspace, a.nodes}; }
Space make_space(const TreeAdvantagesArgs& a) {
  return {a.workspace, a.leave_one_out || a.scale_by_std ? a.nodes : 0};
}

__device__ __forceinline__ bool is_parent(int64_t parent, int64_t node) {
  return parent >= -1 && parent < node;
}

__global__ void check_parents(const int32_t* parent, int64_t nodes, int64_t* result) {
  const int64_t node = thread_item();
  if (node < nodes && !is_parent(parent[node], node)) *result = kMalformed;
}

// Sort keys: the parent of a counted child; behind all of them, `nodes` for other nodes.
// `all_counted`: a node below a root that is not counted is malformed.
__global__ void make_keys(const int32_t* parent, const uint8_t* in_value, int64_t nodes,
                          bool all_counted, uint32_t* keys, int32_t* items, int64_t* result) {
  const int64_t node = thread_item();
  if (node >= nodes) return;
  const int64_t up = parent[node];
  const bool below = up >= 0 && up < node, counted = below && in_value[node];
  if (!is_parent(up, node) || (all_counted && below && !counted)) *result = kMalformed;
  keys[node] = static_cast<uint32_t>(counted ? up : nodes);
  items[node] = static_cast<int32_t>(node);
}

// begin and end come zeroed, for nodes without children.
__global__ void find_children(const uint32_t* keys, int64_t nodes, int32_t* begin, int32_t* end,
                              const int64_t* result) {
  const int64_t i = thread_item();
  if (i >= nodes || *result == kMalformed || keys[i] >= nodes) return;
  if (i == 0 || keys[i - 1] != keys[i]) begin[keys[i]] = static_cast<int32_t>(i);
  if (i + 1 == nodes || keys[i + 1] != keys[i]) end[keys[i]] = static_cast<int32_t>(i + 1);
}

// Checks the parents and makes the child lists.
void list_children(const CheckedLaunch& run, const int32_t* parent, const uint8_t* in_value,
                   int64_t nodes, bool all_counted, void* stream, Space* space) {
  run.threads(make_keys, nodes, parent, in_value, nodes, all_counted, space->keys, space->unsorted);
  space->sort_by_parent(nodes, stream);
  run.threads(find_children, nodes, space->sorted_keys, nodes, space->begin, space->end);
}

// `arrived` is, for every node, the number of counted children whose value is ready; the last of
// them computes the node. Returning early is safe, as no thread waits for another.
__global__ void climb(const __grid_constant__ TreeArgs a, Children children, int32_t* arrived,
                      double* values, int64_t* result) {
  int64_t node = thread_item();
  if (node >= a.nodes || *result == kMalformed || children.count(node) > 0) return;
  double value = a.rewards[node];
  for (;;) {
    values[node] = value;
    const int64_t up = a.parent[node];
    if (up < 0 || !a.in_value[node]) return;
    __threadfence();  // the value must be visible before the count
    const int32_t count = children.count(up);
    if (atomicAdd(&arrived[up], 1) + 1 < count) return;
    __threadfence();
    node = up;
    if (!std::isnan(a.rewards[node])) *result = kMalformed;
    double sum = 0;
    for (int32_t i = children.end[node] - 1; i >= children.begin[node]; --i)
      sum += __ldcg(&values[children.nodes[i]]);  // not from an L1 line older than the value
    value = sum / count;
  }
}

__global__ void round_values(const double* values, int64_t nodes, float* out,
                             const int64_t* result) {
  const int64_t node = thread_item();
  if (node < nodes) out[node] = *result == kMalformed ? NAN : static_cast<float>(values[node]);
}

// Sum and population variance over the counted children of a node.
struct Moments {
  double sum, variance;
};

// Two sweeps over the values, so that equal values give a variance of exactly zero. The variance
// is NaN where there are no children.
__device__ __forceinline__ Moments child_moments(const float* values, const Children& children,
                                                 int64_t node) {
  const int32_t begin = children.begin[node], end = children.end[node];
  double sum = 0, squares = 0;
  for (int32_t i = begin; i < end; ++i) sum += values[children.nodes[i]];
  const double mean = sum / (end - begin);
  for (int32_t i = begin; i < end; ++i) {
    const double deviation = values[children.nodes[i]] - mean;
    squares += deviation * deviation;
  }
  return {sum, squares / (end - begin)};
}

__global__ void write_stats(const __grid_constant__ TreeStatsArgs a, Children children,
                            const int64_t* result) {
  const int64_t node = thread_item();
  if (node >= a.nodes) return;
  const bool good = *result != kMalformed;
  a.counts[node] = good ? children.count(node) : -1;
  a.variances[node] =
      good ? static_cast<float>(child_moments(a.values, children, node).variance) : NAN;
}

__global__ void sum_children(const float* values, int64_t nodes, Children children, double* sums,
                             double* variances, const int64_t* result) {
  const int64_t node = thread_item();
  if (node >= nodes || *result == kMalformed) return;
  const Moments moments = child_moments(values, children, node);
  sums[node] = moments.sum;
  variances[node] = moments.variance;
}

__global__ void advance_nodes(const __grid_constant__ TreeAdvantagesArgs a, Children children,
                              const double* sums, const double* variances, const int64_t* result) {
  const int64_t node = thread_item();
  if (node >= a.nodes) return;
  if (*result == kMalformed) {
    a.advantages[node] = NAN;
    return;
  }
  const int64_t up = a.parent[node];
  if (up < 0) {
    a.advantages[node] = 0;
    return;
  }
  const double value = a.values[node];
  double baseline = a.values[up];
  if (a.leave_one_out) {
    const int32_t others = children.count(up) - 1;
    baseline = others == 0 ? value : (sums[up] - value) / others;
  }
  double advantage = value - baseline;
  if (a.scale_by_std) advantage /= sqrt(variances[up]) + a.eps;
  a.advantages[node] = static_cast<float>(advantage);
}

}  // namespace

int64_t tree_workspace(const TreeArgs& args) { return make_space(args).bytes; }
int64_t tree_stats_workspace(const TreeStatsArgs& args) { return make_space(args).bytes; }
int64_t tree_advantages_workspace(const TreeAdvantagesArgs& args) { return make_space(args).bytes; }

void tree_cuda(const TreeArgs& args) {
  Space space = make_space(args);
  const CheckedLaunch run(args.workspace, space.zeroed, args.stream);
  if (args.nodes == 0) return;
  list_children(run, args.parent, args.in_value, args.nodes, false, args.stream, &space);
  run.threads(climb, args.nodes, args, space.children(), space.arrived, space.first);
  run.threads(round_values, args.nodes, space.first, args.nodes, args.values);
}

void tree_stats_cuda(const TreeStatsArgs& args) {
  Space space = make_space(args);
  const CheckedLaunch run(args.workspace, space.zeroed, args.stream);
  if (args.nodes == 0) return;
  list_children(run, args.parent, args.in_value, args.nodes, false, args.stream, &space);
  run.threads(write_stats, args.nodes, args, space.children());
}

void tree_advantages_cuda(const TreeAdvantagesArgs& args) {
  Space space = make_space(args);
  const CheckedLaunch run(args.workspace, space.zeroed, args.stream);
  if (args.nodes == 0) return;
  if (args.leave_one_out || args.scale_by_std) {
    list_children(run, args.parent, args.in_value, args.nodes, args.leave_one_out, args.stream,
                  &space);
    run.threads(sum_children, args.nodes, args.values, args.nodes, space.children(), space.first,
                space.second);
  } else {
    run.threads(check_parents, args.nodes, args.parent, args.nodes);
  }
  run.threads(advance_nodes, args.nodes, args, space.children(), space.first, space.second);
}

}  // namespace spo
