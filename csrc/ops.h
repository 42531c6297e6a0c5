#pragma once
// Arguments of the native kernels: one plain struct per op, shared by the CPU and CUDA launchers.
// Pointers point to contiguous arrays unless a stride says otherwise; sizes and strides count
// elements. The Python side owns every buffer and has checked shapes and dtypes.
#include <cmath>
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

enum KlScope : int32_t { kMasked = 0, kAll = 1 };  // tokens that the KL term covers

// What a token takes part in; kRuns: its row is computed; kLost: but its hidden state does not
// exist.
enum Use : uint8_t { kInPolicy = 1, kInKl = 2, kLost = 4, kRuns = 8 };

// A row's figures, columns of `stats`; those from kLow on are 0 or 1.
enum Stat : int32_t { kPolicyTerm, kKlTerm, kEntropyTerm, kRatio, kKlEstimate, kLow, kHigh, kMax };
constexpr int kStats = 8;

// Bits of what is wrong with the input.
constexpr int64_t kBadToken = 1, kBadState = 2, kBadNorm = 4;

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

// The fields of a struct are listed once, as FIELD(type, name, initial value). The list generates
// the struct and its Python class (csrc/bindings.cpp).
#define SPO_MEMBER(type, name, initial) type name = initial;
#define SPO_ARRAY(name, absent) const float* name = nullptr;

// The objective's inputs per token, and its scalars: the fields of `Tokens` in
// spo_kernels/tokens.py. PER_TOKEN(name, absent) is an array of N floats. The objective receives
// the row's value (`Token` in csrc/objective.h), or `absent` if the array is null.
#define SPO_TOKEN_FIELDS(FIELD, PER_TOKEN)                                                         \
  FIELD(const void*, token_ids, nullptr)    /* (N,) integers, read where a token is kept */        \
  PER_TOKEN(old_logprobs, 0)                /* (N,), null: those of this pass */                   \
  PER_TOKEN(advantages, 0)                  /* (N,) */                                             \
  PER_TOKEN(weights, 1)                     /* (N,), of the policy term */                         \
  PER_TOKEN(ref_logprobs, 0)                /* (N,), null: no KL */                                \
  PER_TOKEN(kl_weights, 1)                  /* (N,) */                                             \
  FIELD(const void*, loss_mask, nullptr)    /* (N,) bool or integers, not 0: trained; null: all */ \
  FIELD(const float*, temperature, nullptr) /* (N,) or (1,); null: temperature_value */            \
  FIELD(const void*, policy_norm, nullptr)  /* (), Z; null: policy_norm_value */                   \
  FIELD(const void*, kl_norm, nullptr)      /* (), Z_kl; null: kl_norm_value */                    \
  FIELD(double, temperature_value, 1)                                                              \
  FIELD(double, policy_norm_value, -1) /* negative: the number of kept tokens */                   \
  FIELD(double, kl_norm_value, -1)                                                                 \
  FIELD(float, logit_scale, 1)                                                                     \
  FIELD(float, logit_softcap, INFINITY)                                                            \
  FIELD(float, log_threshold, INFINITY) /* kept: old_logprobs below it */                          \
  FIELD(float, clip_eps_low, 0)                                                                    \
  FIELD(float, clip_eps_high, 0)                                                                   \
  FIELD(float, clip_ratio_max, INFINITY) /* for negative advantages */                             \
  FIELD(float, log_ratio_clamp, INFINITY)                                                          \
  FIELD(double, kl_coef, 0)                                                                        \
  FIELD(float, kl_clamp, INFINITY) /* of the log-ratio in k3 */                                    \
  FIELD(double, entropy_coef, 0)                                                                   \
  FIELD(int32_t, kl_estimator, kNoKl)                                                              \
  FIELD(int32_t, kl_scope, kMasked)                                                                \
  FIELD(bool, kl_ratio, false) /* the estimate times the importance ratio */                       \
  FIELD(bool, drop_nan, false) /* tokens with an old logprob of NaN */                             \
  FIELD(bool, metrics, false)  /* every kept row is computed */

// masked_ppo_loss, in three phases: `policy_prepare` finds the tokens that are used and the norms,
// `policy_loss` runs over rows of logits, `policy_finish` sums what they left. `policy_step` is all
// three. Row i of the logits belongs to token i, or to token index[i].
#define SPO_POLICY_LOSS_FIELDS(FIELD, PER_TOKEN)                                                   \
  FIELD(int64_t, tokens, 0)                                                                        \
  FIELD(int64_t, rows, 0) /* of logits */                                                          \
  FIELD(int64_t, vocab, 0)                                                                         \
  FIELD(int32_t, dtype, kFloat32)     /* of logits */                                              \
  FIELD(const void*, logits, nullptr) /* (rows, V) */                                              \
  FIELD(RowLayout, logits_layout, {})                                                              \
  FIELD(void*, dlogits, nullptr) /* (rows, V), may lie over `logits`; null: forward only */        \
  FIELD(RowLayout, dlogits_layout, {})                                                             \
  FIELD(int32_t, dlogits_dtype, kFloat32) /* that of the logits, or half as wide */                \
  FIELD(bool, dlogits_zeroed, false)      /* rows without a gradient need no write */              \
  SPO_TOKEN_FIELDS(FIELD, PER_TOKEN)                                                               \
  FIELD(int32_t, id_bytes, 8)   /* of a token id: 4 or 8 */                                        \
  FIELD(int32_t, mask_bytes, 1) /* of an entry of the loss mask: 1, 2, 4 or 8 */                   \
  FIELD(int64_t, temperature_stride, 0)                                                            \
  FIELD(bool, policy_norm_is_integer, false) /* int64, else float */                               \
  FIELD(bool, kl_norm_is_integer, false)                                                           \
  FIELD(bool, strict, false)        /* after bad input no row is touched */                        \
  FIELD(bool, scaled, false)        /* gradients times a power of two: for fp16 */                 \
  FIELD(uint8_t*, uses, nullptr)    /* (N,) bits of `Use` */                                       \
  FIELD(float*, scales, nullptr)    /* (4,) 1 / Z, kl_coef / Z_kl, entropy_coef / Z, that power */ \
  FIELD(int64_t*, counts, nullptr)  /* (7,) kept, of them computed, all computed; kBad bits; */    \
                                    /* computed > capacity; dropped as NaN; computed with KL */    \
  FIELD(int64_t*, index, nullptr)   /* (capacity,) the used tokens, then N; null: all */           \
  FIELD(int64_t*, states, nullptr)  /* (capacity,) hidden states of `index`, then H */             \
  FIELD(int64_t*, sources, nullptr) /* (capacity,) the same, but always a state that exists */     \
  FIELD(int64_t, capacity, 0)                                                                      \
  FIELD(const int64_t*, hidden_index, nullptr) /* (N,); null: token i has state i */               \
  FIELD(int64_t, num_states, 0)                /* H */                                             \
  FIELD(float*, logprobs, nullptr)             /* (N,), NaN where not computed */                  \
  FIELD(float*, entropy, nullptr)              /* (N,), the same; null: not wanted */              \
  FIELD(float*, stats, nullptr)                /* (N, 8) columns of `Stat` */                      \
  FIELD(float*, loss, nullptr)                 /* () */                                            \
  FIELD(float*, figures, nullptr) /* (10,) FIGURES of spo_kernels/objective.py, and the inverse */ \
                                  /* of the power, times 1 / Z if that is known only after rows */ \
  FIELD(int32_t, num_threads, 1)  /* CPU only */                                                   \
  FIELD(void*, stream, nullptr)   /* CUDA only */
struct PolicyLossArgs {
  SPO_POLICY_LOSS_FIELDS(SPO_MEMBER, SPO_ARRAY)
};

// scale: grad *= factor * unscale, in fp32, rounded once; a product of 1 costs nothing.
#define SPO_SCALE_FIELDS(FIELD)                           \
  FIELD(int64_t, rows, 0)                                 \
  FIELD(int64_t, vocab, 0)                                \
  FIELD(void*, grad, nullptr) /* (rows, V) */             \
  FIELD(int32_t, dtype, kFloat32)                         \
  FIELD(RowLayout, layout, {})                            \
  FIELD(const float*, factor, nullptr)  /* () */          \
  FIELD(const float*, unscale, nullptr) /* (); null: 1 */ \
  FIELD(void*, stream, nullptr)         /* CUDA only */
struct ScaleArgs {
  SPO_SCALE_FIELDS(SPO_MEMBER)
};

// token_logprobs: logprob (and entropy) of N rows. The fields from grad_logprobs to dlogits_dtype
// are for the backward, which reads logprobs, entropy, row_max and row_logsum. With a tanh_scale k
// the logits x count as tanh(k x), and the temperature is that of these.
#define SPO_LOGPROBS_FIELDS(FIELD)                                                                 \
  FIELD(int64_t, rows, 0)                                                                          \
  FIELD(int64_t, vocab, 0)                                                                         \
  FIELD(int32_t, dtype, kFloat32)                                                                  \
  FIELD(const void*, logits, nullptr) /* (N, V) */                                                 \
  FIELD(RowLayout, logits_layout, {})                                                              \
  FIELD(const int64_t*, token_ids, nullptr) /* (N,), read where the mask is set */                 \
  FIELD(const uint8_t*, mask, nullptr)      /* (N,) rows to compute; null: all */                  \
  FIELD(const float*, temperature, nullptr) /* (N,), or one value if temperature_stride is 0 */    \
  FIELD(int64_t, temperature_stride, 0)                                                            \
  FIELD(float, tanh_scale, 0)        /* k, positive; 0: no tanh */                                 \
  FIELD(float*, logprobs, nullptr)   /* (N,), 0 on dropped rows */                                 \
  FIELD(float*, entropy, nullptr)    /* (N,); null: not wanted */                                  \
  FIELD(float*, row_max, nullptr)    /* (N,) largest logit or tanh; kept for the backward */       \
  FIELD(float*, row_logsum, nullptr) /* (N,) log of the sum of exp((logit - max) / temperature) */ \
  FIELD(const float*, grad_logprobs, nullptr) /* (N,) */                                           \
  FIELD(const float*, grad_entropy, nullptr)  /* (N,); null: zero */                               \
  FIELD(void*, dlogits, nullptr)              /* (N, V), may lie over `logits` */                  \
  FIELD(RowLayout, dlogits_layout, {})                                                             \
  FIELD(int32_t, dlogits_dtype, kFloat32) /* that of the logits, or half as wide */                \
  FIELD(int32_t, num_threads, 1)          /* CPU only */                                           \
  FIELD(void*, stream, nullptr)           /* CUDA only */
struct LogprobsArgs {
  SPO_LOGPROBS_FIELDS(SPO_MEMBER)
};

// matmul_bf16: C = A times B transposed, of bf16 numbers, summed and stored in fp32.
#define SPO_MATMUL_FIELDS(FIELD)                                              \
  FIELD(int64_t, rows, 0)                                                     \
  FIELD(int64_t, columns, 0)                                                  \
  FIELD(int64_t, depth, 0)                                                    \
  FIELD(const void*, a, nullptr) /* (rows, depth) bf16 */                     \
  FIELD(int64_t, a_stride, 0)    /* from row to row */                        \
  FIELD(const void*, b, nullptr) /* (columns, depth) bf16 */                  \
  FIELD(int64_t, b_stride, 0)                                                 \
  FIELD(float*, c, nullptr) /* (rows, columns) */                             \
  FIELD(int64_t, c_stride, 0)                                                 \
  FIELD(void*, packed, nullptr) /* room for rows * (depth rounded up to 2) */ \
  FIELD(int32_t, num_threads, 1)
struct MatmulArgs {
  SPO_MATMUL_FIELDS(SPO_MEMBER)
};

// matmul_fixed: C = A times B of fp32, bf16 or fp16 numbers, in fp32. A number of C is a sum in an
// order that depends on the depth alone: not on the other rows and columns, not on the threads.
#define SPO_FIXED_MATMUL_FIELDS(FIELD)                                       \
  FIELD(int64_t, rows, 0)                                                    \
  FIELD(int64_t, columns, 0)                                                 \
  FIELD(int64_t, depth, 0)                                                   \
  FIELD(const void*, a, nullptr) /* (rows, depth) */                         \
  FIELD(int32_t, a_dtype, kFloat32)                                          \
  FIELD(int64_t, a_stride, 0)    /* from row to row */                       \
  FIELD(const void*, b, nullptr) /* (depth, columns), or (columns, depth) */ \
  FIELD(int32_t, b_dtype, kFloat32)                                          \
  FIELD(int64_t, b_stride, 0)                                                \
  FIELD(bool, b_transposed, false) /* B is (columns, depth) */               \
  FIELD(float*, c, nullptr)        /* (rows, columns) */                     \
  FIELD(int64_t, c_stride, 0)                                                \
  FIELD(int32_t, num_threads, 1)
struct FixedMatmulArgs {
  SPO_FIXED_MATMUL_FIELDS(SPO_MEMBER)
};

// cutpoint_segments: where the segments of B packed sequences start.
#define SPO_SEGMENTS_FIELDS(FIELD)                                                     \
  FIELD(int64_t, tokens, 0)                                                            \
  FIELD(int64_t, seqs, 0)                                                              \
  FIELD(const float*, logprobs, nullptr)     /* (T,) */                                \
  FIELD(const int64_t*, cu_seqlens, nullptr) /* (B + 1,) */                            \
  FIELD(float, log_threshold, 0)                                                       \
  FIELD(int64_t, interval, 1)               /* cutpoints in a segment, at least 1 */   \
  FIELD(int64_t*, cu_segments, nullptr)     /* (T + 1,), of which M + 1 are written */ \
  FIELD(int64_t*, cu_seq_segments, nullptr) /* (B + 1,) */                             \
  FIELD(void*, workspace, nullptr)          /* CUDA only */                            \
  FIELD(void*, stream, nullptr)             /* CUDA only */
struct SegmentsArgs {
  SPO_SEGMENTS_FIELDS(SPO_MEMBER)
};

// segment_advantages: V(end) - V(start) on every token of M segments in B sequences.
#define SPO_SEGMENT_ADVANTAGES_FIELDS(FIELD)                      \
  FIELD(int64_t, tokens, 0)                                       \
  FIELD(int64_t, segments, 0)                                     \
  FIELD(int64_t, seqs, 0)                                         \
  FIELD(const float*, values, nullptr)            /* (M + B,) */  \
  FIELD(const int64_t*, cu_segments, nullptr)     /* (M + 1,) */  \
  FIELD(const int64_t*, cu_seq_segments, nullptr) /* (B + 1,) */  \
  FIELD(float*, advantages, nullptr)              /* (T,) */      \
  FIELD(void*, workspace, nullptr)                /* CUDA only */ \
  FIELD(void*, stream, nullptr)                   /* CUDA only */
struct SegmentAdvantagesArgs {
  SPO_SEGMENT_ADVANTAGES_FIELDS(SPO_MEMBER)
};

// tree_values: bottom-up values of S nodes, parents before children.
#define SPO_TREE_FIELDS(FIELD)                                              \
  FIELD(int64_t, nodes, 0)                                                  \
  FIELD(const int32_t*, parent, nullptr)   /* (S,), -1 for a root */        \
  FIELD(const float*, rewards, nullptr)    /* (S,), NaN where not a leaf */ \
  FIELD(const uint8_t*, in_value, nullptr) /* (S,) */                       \
  FIELD(float*, values, nullptr)           /* (S,) */                       \
  FIELD(void*, workspace, nullptr)         /* CUDA only */                  \
  FIELD(void*, stream, nullptr)            /* CUDA only */
struct TreeArgs {
  SPO_TREE_FIELDS(SPO_MEMBER)
};

// tree_stats: count and population variance of every node's counted children.
#define SPO_TREE_STATS_FIELDS(FIELD)                                            \
  FIELD(int64_t, nodes, 0)                                                      \
  FIELD(const int32_t*, parent, nullptr)   /* (S,) */                           \
  FIELD(const float*, values, nullptr)     /* (S,) */                           \
  FIELD(const uint8_t*, in_value, nullptr) /* (S,) */                           \
  FIELD(int32_t*, counts, nullptr)         /* (S,) */                           \
  FIELD(float*, variances, nullptr)        /* (S,), NaN where the count is 0 */ \
  FIELD(void*, workspace, nullptr)         /* CUDA only */                      \
  FIELD(void*, stream, nullptr)            /* CUDA only */
struct TreeStatsArgs {
  SPO_TREE_STATS_FIELDS(SPO_MEMBER)
};

// tree_advantages: every node's value relative to its parent's or its siblings'.
#define SPO_TREE_ADVANTAGES_FIELDS(FIELD)                                                      \
  FIELD(int64_t, nodes, 0)                                                                     \
  FIELD(const int32_t*, parent, nullptr)   /* (S,) */                                          \
  FIELD(const float*, values, nullptr)     /* (S,) */                                          \
  FIELD(const uint8_t*, in_value, nullptr) /* (S,) */                                          \
  FIELD(bool, leave_one_out, false) /* baseline: mean of the other siblings, not the parent */ \
  FIELD(bool, scale_by_std, false)                                                             \
  FIELD(double, eps, 0)                                                                        \
  FIELD(float*, advantages, nullptr) /* (S,), 0 on roots */                                    \
  FIELD(void*, workspace, nullptr)   /* CUDA only */                                           \
  FIELD(void*, stream, nullptr)      /* CUDA only */
struct TreeAdvantagesArgs {
  SPO_TREE_ADVANTAGES_FIELDS(SPO_MEMBER)
};

// gae: generalised advantage estimation over B packed sequences.
#define SPO_GAE_FIELDS(FIELD)                                                               \
  FIELD(int64_t, tokens, 0)                                                                 \
  FIELD(int64_t, seqs, 0)                                                                   \
  FIELD(const float*, rewards, nullptr)          /* (T,) */                                 \
  FIELD(const float*, values, nullptr)           /* (T,) */                                 \
  FIELD(const int64_t*, cu_seqlens, nullptr)     /* (B + 1,) */                             \
  FIELD(const float*, bootstrap_values, nullptr) /* (B,); null: 0 after every last token */ \
  FIELD(double, gamma, 1)                                                                   \
  FIELD(double, lam, 1)                                                                     \
  FIELD(float*, advantages, nullptr) /* (T,) */                                             \
  FIELD(float*, returns, nullptr)    /* (T,) */
struct GaeArgs {
  SPO_GAE_FIELDS(SPO_MEMBER)
};

// CPU launchers; each returns when its outputs are written.
void policy_prepare_cpu(const PolicyLossArgs& args);
void policy_loss_cpu(const PolicyLossArgs& args);
void policy_finish_cpu(const PolicyLossArgs& args);
void policy_step_cpu(const PolicyLossArgs& args);
void logprobs_cpu(const LogprobsArgs& args);
void logprobs_backward_cpu(const LogprobsArgs& args);
void matmul_fixed_cpu(const FixedMatmulArgs& args);
void matmul_bf16_cpu(const MatmulArgs& args);  // where has_bf16_products() (csrc/cpu/isa.h)

// These check offsets and parents before they use them. They return false (or -1) if the input is
// malformed; the outputs are then undefined, and the reference names the bad entry. segments_cpu
// returns M.
int64_t segments_cpu(const SegmentsArgs& args);
bool segment_advantages_cpu(const SegmentAdvantagesArgs& args);
bool tree_cpu(const TreeArgs& args);
bool tree_stats_cpu(const TreeStatsArgs& args);
bool tree_advantages_cpu(const TreeAdvantagesArgs& args);
bool gae_cpu(const GaeArgs& args);

// CUDA launchers, on the current device, which the caller has made that of the buffers, and on
// `stream`. They return at once; std::runtime_error if CUDA reports an error. A token id out of
// [0, V) makes the row's logprob NaN. cuda_problem says why the kernels cannot run on the current
// device, in CUDA's words: a driver that is too old, no code for the device. Empty: they can.
const char* cuda_problem();
void policy_prepare_cuda(const PolicyLossArgs& args);
void policy_loss_cuda(const PolicyLossArgs& args);
void policy_finish_cuda(const PolicyLossArgs& args);
void policy_step_cuda(const PolicyLossArgs& args);
void scale_cuda(const ScaleArgs& args);
void logprobs_cuda(const LogprobsArgs& args);
void logprobs_backward_cuda(const LogprobsArgs& args);

// These check offsets and parents on the device. They take a workspace, of the number of bytes that
// <op>_workspace returns and aligned to 256. The int64 at its start becomes M (segments_cuda) or 0,
// and -1 if the input is malformed. Every output is then NaN, and counts are -1; those of
// segments_cuda are undefined.
int64_t segments_workspace(const SegmentsArgs& args);
int64_t segment_advantages_workspace(const SegmentAdvantagesArgs& args);
int64_t tree_workspace(const TreeArgs& args);
int64_t tree_stats_workspace(const TreeStatsArgs& args);
int64_t tree_advantages_workspace(const TreeAdvantagesArgs& args);
void segments_cuda(const SegmentsArgs& args);
void segment_advantages_cuda(const SegmentAdvantagesArgs& args);
void tree_cuda(const TreeArgs& args);
void tree_stats_cuda(const TreeStatsArgs& args);
void tree_advantages_cuda(const TreeAdvantagesArgs& args);

}  // namespace spo
