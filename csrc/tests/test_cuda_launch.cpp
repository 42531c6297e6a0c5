// What the CUDA launchers ask of the runtime, on the devices there are and for all kinds of shapes.
// Nothing runs here: the stand-in of emulated/cuda_runtime.h records, and refuses what a GPU would.
// It has no call that allocates or waits, so a launcher that made one would not compile.
#include <cstdint>
#include <cstdio>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <vector>

#include "csrc/cuda/held_row.cuh"
#include "csrc/ops.h"
#include "csrc/tests/check.h"

namespace {

using spo::Dtype;
using spo::emulation::Launch;
using spo::emulation::Runtime;
using spo::emulation::runtime;

struct Device {
  const char* name;
  int64_t shared_per_multiprocessor, shared_per_block;
  bool clusters;  // whether it loads code with clusters; a newer device may load that of sm_80
  int largest_cluster;
};

constexpr int64_t kKb = 1 << 10;
constexpr Device kDevices[] = {
    {"sm_80", 164 * kKb, 163 * kKb, false, 0},
    {"sm_90", 228 * kKb, 227 * kKb, true, 16},
    {"sm_90 with few multiprocessors", 228 * kKb, 227 * kKb, true, 8},
    {"sm_90 with less for a block", 228 * kKb, 163 * kKb, true, 8},
    {"sm_100", 228 * kKb, 227 * kKb, true, 16},
    {"sm_120", 100 * kKb, 99 * kKb, true, 8},
    {"sm_120 with the code of sm_80", 100 * kKb, 99 * kKb, false, 0},
};
constexpr int64_t kVocabs[] = {1,      2,      7,      33,      300,     1003,    5000,   32000,
                               50257,  128256, 151936, 152064,  256000,  262144,  300001, 400000,
                               500000, 929000, 930000, 1 << 20, 1 << 21, 3 << 20, 1 << 24};

void reset(const Device& device) {
  runtime = Runtime();
  runtime.runs = false;
  runtime.shared_per_multiprocessor = device.shared_per_multiprocessor;
  runtime.shared_per_block = device.shared_per_block;
  runtime.clusters = device.clusters;
  runtime.largest_cluster = device.largest_cluster;
}

// Any address will do for a stream that nothing reads.
char stream_of_test;
void* const kStream = &stream_of_test;

void check_launch(const Launch& launch) {
  CHECK(launch.stream == kStream);
  CHECK(launch.blocks > 0 && launch.blocks <= 2147483647u);
  CHECK(launch.threads >= 32 && launch.threads <= 1024 && launch.threads % 32 == 0);
  CHECK(launch.shared_bytes <= runtime.shared_per_block);
  if (launch.shared_bytes > 48 * kKb) {
    CHECK(launch.allowed.shared_bytes == launch.shared_bytes);
    CHECK(launch.allowed.carveout == 100);
  }
  CHECK(launch.blocks % static_cast<unsigned>(launch.cluster) == 0);
  CHECK(launch.cluster <= (launch.allowed.non_portable_cluster ? 16 : 8));
  CHECK(launch.cluster == 1 || launch.cluster <= runtime.largest_cluster);
}

// Runs a launcher and checks its launches; returns them.
template <class Args>
std::vector<Launch> launches_of(void (*launcher)(const Args&), Args args) {
  args.stream = kStream;
  runtime.launches.clear();
  runtime.allowed.clear();
  launcher(args);
  for (const Launch& launch : runtime.launches) check_launch(launch);
  CHECK(runtime.last_error == cudaSuccess);
  return runtime.launches;
}

// The one launch of a row kernel, with a cluster a row.
template <class Args>
void check_rows(void (*launcher)(const Args&), const Args& args) {
  const auto launches = launches_of(launcher, args);
  if (!CHECK(launches.size() == (args.rows > 0 ? 1 : 0)) || launches.empty()) return;
  const Launch& launch = launches[0];
  CHECK(launch.blocks == args.rows * launch.cluster);
  // Beyond 48 KB, and in a cluster, a block holds its share of the row.
  const int64_t width = args.dtype == spo::kFloat32 ? 4 : 2;
  if (launch.cluster > 1 || launch.shared_bytes > 48 * kKb)
    CHECK(launch.shared_bytes >= args.vocab / (16 / width) * 16 / launch.cluster);
}

char nowhere;  // for pointers that only must not be null

void test_rows(Dtype dtype, Dtype grads_dtype, int64_t rows, int64_t vocab) {
  spo::PolicyLossArgs loss;
  loss.rows = rows, loss.vocab = vocab, loss.dtype = dtype, loss.dlogits_dtype = grads_dtype;
  check_rows(spo::policy_loss_cuda, loss);
  loss.dlogits = &nowhere;
  check_rows(spo::policy_loss_cuda, loss);
  spo::LogprobsArgs logprobs;
  logprobs.rows = rows, logprobs.vocab = vocab, logprobs.dtype = dtype;
  logprobs.dlogits_dtype = grads_dtype;
  check_rows(spo::logprobs_cuda, logprobs);
  check_rows(spo::logprobs_backward_cuda, logprobs);
}

// One memset and few launches, all on the stream.
template <class Args>
void check_packed(int64_t (*workspace_of)(const Args&), void (*launcher)(const Args&), Args args,
                  size_t launches, size_t sorts) {
  const int64_t bytes = workspace_of(args);
  CHECK(bytes >= 8);
  alignas(256) static char workspace[256];
  args.workspace = workspace;
  runtime.memsets.clear(), runtime.sorts.clear();
  CHECK(launches_of(launcher, args).size() == launches);
  CHECK(runtime.memsets == std::vector<cudaStream_t>{static_cast<cudaStream_t>(kStream)});
  CHECK(runtime.sorts == std::vector<cudaStream_t>(sorts, static_cast<cudaStream_t>(kStream)));
}

void test_packed(int64_t items) {
  const bool some = items > 0;
  spo::TreeArgs tree;
  tree.nodes = items;
  check_packed(spo::tree_workspace, spo::tree_cuda, tree, some ? 4 : 0, some);
  spo::TreeStatsArgs stats;
  stats.nodes = items;
  check_packed(spo::tree_stats_workspace, spo::tree_stats_cuda, stats, some ? 3 : 0, some);
  spo::TreeAdvantagesArgs advantages;
  advantages.nodes = items;
  const auto workspace = spo::tree_advantages_workspace;
  check_packed(workspace, spo::tree_advantages_cuda, advantages, some ? 2 : 0, 0);
  CHECK(workspace(advantages) <= 1024);
  advantages.leave_one_out = true;
  check_packed(workspace, spo::tree_advantages_cuda, advantages, some ? 4 : 0, some);
  spo::SegmentsArgs segments;
  segments.tokens = segments.seqs = items;
  check_packed(spo::segments_workspace, spo::segments_cuda, segments, some ? 4 : 2, 0);
  spo::SegmentAdvantagesArgs tokens;
  tokens.tokens = tokens.segments = tokens.seqs = items;
  check_packed(spo::segment_advantages_workspace, spo::segment_advantages_cuda, tokens,
               some ? 3 : 2, 0);
}

void plan_kernel() {}

// The shapes that the kernel is made for: three blocks on a multiprocessor of 228 KB.
void test_plan() {
  const struct {
    int64_t bytes;
    int cluster, blocks;
    bool large;  // whether the device has room for clusters of 16
  } expected[] = {{151936 * 2, 4, 3, true},  {151936 * 4, 8, 3, true},  {152064 * 2, 4, 3, true},
                  {32000 * 2, 1, 3, true},   {32000 * 4, 2, 3, true},   {128256 * 2, 4, 3, true},
                  {262144 * 2, 8, 3, true},  {64, 1, 3, true},          {256000 * 4, 16, 3, true},
                  {262144 * 4, 16, 3, true}, {256000 * 4, 8, 1, false}, {262144 * 4, 8, 1, false},
                  {500000 * 4, 16, 1, true}, {929000 * 4, 16, 0, false}};
  for (const auto& row : expected) {
    reset(kDevices[row.large ? 1 : 2]);
    const spo::LaunchShape shape = spo::plan_held_row(plan_kernel, 100, row.bytes);
    CHECK(runtime.last_error == cudaSuccess);
    if (row.blocks == 0) {
      CHECK(shape.threads == 0);
      continue;
    }
    CHECK(shape.cluster == row.cluster && shape.blocks == 100 * row.cluster);
    CHECK((228 << 10) / (shape.shared_bytes + 1024) >= row.blocks);
    CHECK(shape.shared_bytes <= 227 * kKb);
    const int64_t pieces = spo::ceil_div(row.bytes / 16, row.cluster * shape.threads * 2);
    CHECK(pieces <= spo::kMaxPieces);
  }
}

// The sentence that a launcher throws; empty if it does not.
template <class Args>
std::string error_of(void (*launcher)(const Args&), const Args& args) {
  try {
    launcher(args);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

void test_errors() {
  spo::PolicyLossArgs loss;
  loss.rows = 3, loss.vocab = 262144, loss.dlogits = &nowhere;
  const struct {
    const char *call, *sentence;
  } expected[] = {
      {"cudaGetDevice", "CUDA: no current device: the emulation's error"},
      {"cudaDeviceGetAttribute", "CUDA: device attribute: the emulation's error"},
      {"cudaFuncGetAttributes", "CUDA: kernel attributes: the emulation's error"},
      {"cudaFuncSetAttribute", "CUDA: shape of a block: the emulation's error"},
      {"cudaOccupancyMaxActiveClusters", ""},
      {"cudaLaunchKernelEx", "CUDA: kernel launch: the emulation's error"},
  };
  for (const auto& row : expected) {
    reset(kDevices[1]);
    runtime.failing = row.call;
    CHECK(error_of(spo::policy_loss_cuda, loss) == row.sentence);
    CHECK(runtime.last_error == cudaSuccess);
  }
  CHECK(runtime.launches.back().cluster == 16);

  alignas(256) static char workspace[256];
  spo::TreeArgs tree;
  tree.nodes = 9, tree.workspace = workspace;
  for (const char* call : {"cudaMemsetAsync", "SortPairs"}) {
    reset(kDevices[1]);
    runtime.failing = call;
    CHECK(error_of(spo::tree_cuda, tree).find("CUDA: ") == 0);
    CHECK(runtime.last_error == cudaSuccess);
  }

  reset(kDevices[1]);
  loss.rows = int64_t{1} << 28;
  CHECK(error_of(spo::policy_loss_cuda, loss) ==
        "CUDA: expected work for at most 2147483647 blocks, found 2147483648: pass fewer rows in a "
        "call");
  CHECK(runtime.launches.empty() && runtime.last_error == cudaSuccess);
}

}  // namespace

int main() {
  for (const Device& device : kDevices) {
    reset(device);
    const int before = spo::check::failures;
    for (int64_t rows : {0, 1, 70000}) {
      for (int64_t vocab : kVocabs) {
        for (Dtype dtype : {spo::kFloat32, spo::kBFloat16, spo::kFloat16})
          test_rows(dtype, dtype, rows, vocab);
        test_rows(spo::kFloat32, spo::kBFloat16, rows, vocab);
      }
      test_packed(rows);
    }
    if (spo::check::failures > before) std::fprintf(stderr, "on %s\n", device.name);
  }
  test_plan();
  test_errors();
  return spo::check::finish("test_cuda_launch");
}
