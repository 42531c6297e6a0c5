#pragma once
// What the native kernels are told: one plain struct per op, shared by the CPU and CUDA launchers.
// Pointers are to contiguous arrays unless a stride says otherwise; sizes and strides count
// elements. The Python side owns every buffer and has checked shapes and dtypes.
#include <cstdint>

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

static inline int64_t row_offset(const RowLayout& layout, int64_t row) {
  return row / layout.block_rows * layout.block_stride +
         row % layout.block_rows * layout.row_stride;
}

// masked_ppo_loss: objective, metrics and dlogits of N rows.
struct PolicyLossArgs {
  int64_t rows = 0;
  int64_t vocab = 0;
  int32_t dtype = kFloat32;      // of logits and dlogits
  const void* logits = nullptr;  // (N, V)
  RowLayout logits_layout;
  void* dlogits = nullptr;  // (N, V), may be `logits` itself; null: forward only
  RowLayout dlogits_layout;
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
  int32_t num_threads = 1;
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
  int32_t num_threads = 1;
};

// CPU launchers; each returns when its outputs are written.
void policy_loss_cpu(const PolicyLossArgs& args);
void logprobs_cpu(const LogprobsArgs& args);
void logprobs_backward_cpu(const LogprobsArgs& args);

}  // namespace spo
