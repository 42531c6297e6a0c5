#pragma once
// What the native kernels are told: one plain struct per op, shared by the CPU and CUDA launchers.
// Pointers are to contiguous arrays unless a stride says otherwise; sizes and strides count
// elements. The Python side owns every buffer and has checked shapes and dtypes.
#include <cstdint>

#ifdef __CUDACC__
#define SPO_HOST_DEVICE __host__ __device__ __forceinline__
#else
// Internal linkage: on the CPU this header is compiled for several instruction sets.
#define SPO_HOST_DEVICE static inline
#endif

namespace spo {

enum Dtype : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

enum KlEstimator : int32_t { kNoKl = 0, kK1 = 1, kK2 = 2, kK3 = 3 };

// N logits rows of V entries. Row i starts at (i / block_rows) * block_stride
// + (i % block_rows) * row_stride, so that a view such as logits[:, :-1] needs no copy.
struct RowLayout {
  int64_t block_rows = 1;
  int64_t block_stride = 0;
  int64_t row_stride = 0;
};

SPO_HOST_DEVICE int64_t row_offset(const RowLayout& layout, int64_t row) {
  return row / layout.block_rows * layout.block_stride +
         row % layout.block_rows * layout.row_stride;
}

// masked_ppo_loss: objective, metrics and dlogits of N rows.
struct PolicyLossArgs {
  int64_t rows = 0;
  int64_t vocab = 0;
  int32_t dtype = kFloat32;      // of logits
  const void* logits = nullptr;  // (N, V)
  RowLayout logits_layout;
  void* dlogits = nullptr;  // (N, V), may be `logits` itself; null: forward only
  RowLayout dlogits_layout;
  int32_t dlogits_dtype = kFloat32;     // that of the logits, or bf16 with fp32 logits
  bool dlogits_zeroed = false;          // rows without a gradient need no write
  const int64_t* token_ids = nullptr;   // (N,), read where a mask is set
  const float* old_logprobs = nullptr;  // (N,)
  const float* advantages = nullptr;    // (N,)
  const float* ref_logprobs = nullptr;  // (N,), may be null if kl_mask is
  const float* temperature = nullptr;   // (N,), or one value if temperature_stride is 0
  int64_t temperature_stride = 0;
  const uint8_t* policy_mask = nullptr;  // (N,) rows with a policy term
  const uint8_t* kl_mask = nullptr;      // (N,) rows with a KL term; null: none
  const float* scales = nullptr;         // (2,) 1 / Z and kl_coef / Z_kl
  float clip_eps_low = 0;
  float clip_eps_high = 0;
  float log_ratio_clamp = 0;
  int32_t kl_estimator = kNoKl;
  float* logprobs = nullptr;  // (N,), 0 on dropped rows
  float* entropy = nullptr;   // (N,), 0 on dropped rows; null: not wanted
  float* stats = nullptr;     // (N, 4) policy term, KL term, clipped, ratio
  int32_t num_threads = 1;    // CPU only
  void* stream = nullptr;     // CUDA only
};

// token_logprobs: logprob (and entropy) of N rows.
struct LogprobsArgs {
  int64_t rows = 0;
  int64_t vocab = 0;
  int32_t dtype = kFloat32;
  const void* logits = nullptr;  // (N, V)
  RowLayout logits_layout;
  const int64_t* token_ids = nullptr;  // (N,), read where the mask is set
  const uint8_t* mask = nullptr;       // (N,) rows to compute; null: all
  const float* temperature = nullptr;  // (N,), or one value if temperature_stride is 0
  int64_t temperature_stride = 0;
  float* logprobs = nullptr;    // (N,), 0 on dropped rows
  float* entropy = nullptr;     // (N,); null: not wanted
  float* row_max = nullptr;     // (N,) largest logit; kept for the backward
  float* row_logsum = nullptr;  // (N,) log of the sum of exp((logit - max) / temperature)
  // Backward only; it reads logprobs, entropy, row_max and row_logsum.
  const float* grad_logprobs = nullptr;  // (N,)
  const float* grad_entropy = nullptr;   // (N,); null: zero
  void* dlogits = nullptr;               // (N, V), may be `logits` itself
  RowLayout dlogits_layout;
  int32_t dlogits_dtype = kFloat32;  // that of the logits, or bf16 with fp32 logits
  int32_t num_threads = 1;           // CPU only
  void* stream = nullptr;            // CUDA only
};

// cutpoint_segments: where the segments of B packed sequences start.
struct SegmentsArgs {
  int64_t tokens = 0;
  int64_t seqs = 0;
  const float* logprobs = nullptr;      // (T,)
  const int64_t* cu_seqlens = nullptr;  // (B + 1,)
  float log_threshold = 0;
  int64_t interval = 1;                // cutpoints in a segment, at least 1
  int64_t* cu_segments = nullptr;      // (T + 1,), of which M + 1 are written
  int64_t* cu_seq_segments = nullptr;  // (B + 1,)
  void* stream = nullptr;              // CUDA only
};

// segment_advantages: V(end) - V(start) on every token of M segments in B sequences.
struct SegmentAdvantagesArgs {
  int64_t tokens = 0;
  int64_t segments = 0;
  int64_t seqs = 0;
  const float* values = nullptr;             // (M + B,)
  const int64_t* cu_segments = nullptr;      // (M + 1,)
  const int64_t* cu_seq_segments = nullptr;  // (B + 1,)
  float* advantages = nullptr;               // (T,)
  void* stream = nullptr;                    // CUDA only
};

// tree_values: bottom-up values of S nodes, parents before children.
struct TreeArgs {
  int64_t nodes = 0;
  const int32_t* parent = nullptr;    // (S,), -1 for a root
  const float* rewards = nullptr;     // (S,), NaN where not a leaf
  const uint8_t* in_value = nullptr;  // (S,)
  float* values = nullptr;            // (S,)
  void* stream = nullptr;             // CUDA only
};

// tree_stats: count and population variance of every node's counted children.
struct TreeStatsArgs {
  int64_t nodes = 0;
  const int32_t* parent = nullptr;    // (S,)
  const float* values = nullptr;      // (S,)
  const uint8_t* in_value = nullptr;  // (S,)
  int32_t* counts = nullptr;          // (S,)
  float* variances = nullptr;         // (S,), NaN where the count is 0
  void* stream = nullptr;             // CUDA only
};

// tree_advantages: every node's value relative to its parent's or its siblings'.
struct TreeAdvantagesArgs {
  int64_t nodes = 0;
  const int32_t* parent = nullptr;    // (S,)
  const float* values = nullptr;      // (S,)
  const uint8_t* in_value = nullptr;  // (S,)
  bool leave_one_out = false;         // baseline: mean of the other siblings, not the parent
  bool scale_by_std = false;
  double eps = 0;
  float* advantages = nullptr;  // (S,), 0 on roots
  void* stream = nullptr;       // CUDA only
};

// gae: generalised advantage estimation over B packed sequences.
struct GaeArgs {
  int64_t tokens = 0;
  int64_t seqs = 0;
  const float* rewards = nullptr;           // (T,)
  const float* values = nullptr;            // (T,)
  const int64_t* cu_seqlens = nullptr;      // (B + 1,)
  const float* bootstrap_values = nullptr;  // (B,); null: 0 after every last token
  double gamma = 1;
  double lam = 1;
  float* advantages = nullptr;  // (T,)
  float* returns = nullptr;     // (T,)
};

// CPU launchers; each returns when its outputs are written.
void policy_loss_cpu(const PolicyLossArgs& args);
void logprobs_cpu(const LogprobsArgs& args);
void logprobs_backward_cpu(const LogprobsArgs& args);

// These check offsets and parents before they follow them. False (or -1): the input is malformed
// and the outputs mean nothing; the reference then names the entry. segments_cpu returns M.
int64_t segments_cpu(const SegmentsArgs& args);
bool segment_advantages_cpu(const SegmentAdvantagesArgs& args);
bool tree_cpu(const TreeArgs& args);
bool tree_stats_cpu(const TreeStatsArgs& args);
bool tree_advantages_cpu(const TreeAdvantagesArgs& args);
bool gae_cpu(const GaeArgs& args);

// CUDA launchers, on the current device and `stream`; std::runtime_error if CUDA reports an error.
// The row kernels return at once. There, a token id out of [0, V) makes the row's logprob NaN.
void policy_loss_cuda(const PolicyLossArgs& args);
void logprobs_cuda(const LogprobsArgs& args);
void logprobs_backward_cuda(const LogprobsArgs& args);

// These answer as their CPU counterparts do, so they wait for the stream.
int64_t segments_cuda(const SegmentsArgs& args);
bool segment_advantages_cuda(const SegmentAdvantagesArgs& args);
bool tree_cuda(const TreeArgs& args);
bool tree_stats_cuda(const TreeStatsArgs& args);
bool tree_advantages_cuda(const TreeAdvantagesArgs& args);

}  // namespace spo
