#pragma once
// The two sweeps over a logits row that the policy-loss and logprob kernels share. A row of any
// length at any address consists of granules, aligned pieces of 16 bytes that every load and store
// handles whole, and of a few loose elements at its two ends, one thread each. kCapped: with the
// soft cap of csrc/cuda/softcap.cuh, whose k is the tanh_scale.
#include <algorithm>
#include <type_traits>

#include "csrc/cuda/launch.cuh"
#include "csrc/cuda/reduce.cuh"
#include "csrc/cuda/softcap.cuh"
#include "csrc/ops.h"

namespace spo {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class T>
constexpr int kPerGranule = sizeof(Granule) / sizeof(T);

template <class T>
__device__ __forceinline__ T smaller(T a, T b) {
  return b < a ? b : a;
}

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;

__device__ __forceinline__ float bits_to_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
__device__ __forceinline__ uint32_t float_to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(BFloat16 x) {
  return bits_to_float(uint32_t{x.bits} << 16);
}
__device__ __forceinline__ float to_float(Float16 x) { return half_to_float(x.bits); }

// Rounds to nearest even, as PyTorch does.
__device__ __forceinline__ void from_float(float x, float* out) { *out = x; }
__device__ __forceinline__ void from_float(float x, BFloat16* out) {
  out->bits = static_cast<uint16_t>(pack_bfloat16(x, 0));
}
__device__ __forceinline__ void from_float(float x, Float16* out) {
  out->bits = static_cast<uint16_t>(pack_float16(x, 0));
}

// The kPerWord<T> elements of one word of a granule.
template <class T>
constexpr int kPerWord = sizeof(uint32_t) / sizeof(T);

template <class T>
__device__ __forceinline__ void unpack(uint32_t word, float* x) {
  if constexpr (std::is_same_v<T, float>) {
    x[0] = bits_to_float(word);
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    x[0] = bits_to_float(word << 16);
    x[1] = bits_to_float(word & 0xffff0000u);
  } else {
    x[0] = half_to_float(static_cast<uint16_t>(word));
    x[1] = half_to_float(static_cast<uint16_t>(word >> 16));
  }
}

template <class T>
__device__ __forceinline__ void unpack(const Granule& granule, float (&x)[kPerGranule<T>]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) unpack<T>(granule.words[i], x + kPerWord<T> * i);
}

// Element-wise maximum of two words; a NaN loses.
template <class T>
__device__ __forceinline__ uint32_t max_word(uint32_t a, uint32_t b) {
  if constexpr (std::is_same_v<T, float>) {
    return float_to_bits(fmaxf(bits_to_float(a), bits_to_float(b)));
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    return max_bfloat16(a, b);
  } else {
    return max_float16(a, b);
  }
}

// The type of a granule of T after conversion to U: as wide, or half as wide.
template <class T, class U>
struct alignas(kPerGranule<T> * sizeof(U)) Packed {
  uint32_t words[kPerGranule<T> / kPerWord<U>];
};

template <class T, class U>
__device__ __forceinline__ Packed<T, U> pack(const float (&x)[kPerGranule<T>]) {
  Packed<T, U> packed;
#pragma unroll
  for (int i = 0; i < kPerGranule<T> / kPerWord<U>; ++i) {
    if constexpr (std::is_same_v<U, float>) {
      packed.words[i] = float_to_bits(x[i]);
    } else if constexpr (std::is_same_v<U, BFloat16>) {
      packed.words[i] = pack_bfloat16(x[2 * i], x[2 * i + 1]);
    } else {
      packed.words[i] = pack_float16(x[2 * i], x[2 * i + 1]);
    }
  }
  return packed;
}

// A granule of -inf: it adds nothing to any sum.
template <class T>
__device__ __forceinline__ Granule padding() {
  constexpr uint32_t kWord = std::is_same_v<T, float>      ? 0xff800000u
                             : std::is_same_v<T, BFloat16> ? 0xff80ff80u
                                                           : 0xfc00fc00u;
  return {{kWord, kWord, kWord, kWord}};
}

// Where the granules of a row lie; the loose elements are [0, head) and [size - tail, size).
struct Split {
  int head, tail;
  int64_t granules;

  __device__ int loose() const { return head + tail; }
  // The position in the row of loose element i.
  __device__ int64_t element(int i, int64_t size) const {
    return i < head ? i : size - loose() + i;
  }
};

template <class T>
__device__ __forceinline__ int misalignment(const T* p) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(p) % sizeof(Granule));
}

template <class T>
__device__ __forceinline__ Split split_row(const T* row, int64_t size) {
  const int to_next = (static_cast<int>(sizeof(Granule)) - misalignment(row)) % sizeof(Granule);
  const int head = static_cast<int>(smaller<int64_t>(to_next / sizeof(T), size));
  return {head, static_cast<int>((size - head) % kPerGranule<T>), (size - head) / kPerGranule<T>};
}

template <class T>
__device__ __forceinline__ T* row_of(void* base, const RowLayout& layout, int64_t row) {
  return static_cast<T*>(base) + row_offset(layout, row);
}
template <class T>
__device__ __forceinline__ const T* row_of(const void* base, const RowLayout& layout, int64_t row) {
  return static_cast<const T*>(base) + row_offset(layout, row);
}

// The logit of one token, NaN if the row has no such token.
template <class T>
__device__ __forceinline__ float token_logit(const T* row, int64_t size, int64_t token) {
  return token >= 0 && token < size ? to_float(row[token]) : NAN;
}

// First sweep, one step: adds the elements of a few granules. The maximum is raised once per step
// and not once per element: two exponentials per element would be the limit of the kernel. Under
// a cap the tanh of padding would count: only the `left` granules of the row from here on are none.
template <bool kWeighted, class T, bool kCapped = false, int kCount>
__device__ __forceinline__ void add_granules(const Granule (&granules)[kCount], float scale,
                                             Partial* p, float tanh_scale = 0, int64_t left = 0) {
  uint32_t largest = granules[0].words[0];
#pragma unroll
  for (const Granule& granule : granules)
#pragma unroll
    for (uint32_t word : granule.words) largest = max_word<T>(largest, word);
  float x[kPerGranule<T>], max = p->max;
  unpack<T>(largest, x);
#pragma unroll
  for (int i = 0; i < kPerWord<T>; ++i) max = fmaxf(max, swept_logit<kCapped>(x[i], tanh_scale));
  if (kWeighted) {
    raise_max(p, max, scale);
  } else {
    p->sum *= exp2_approx((p->max - max) * scale);
    p->max = max;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (kCapped && i * int64_t{blockDim.x} >= left) break;
    unpack<T>(granules[i], x);
    float sum = 0;
#pragma unroll
    for (float value : x) {
      const float d = (swept_logit<kCapped>(value, tanh_scale) - max) * scale, e = exp2_approx(d);
      sum += e;
      if (kWeighted) p->weighted = fmaf(e, fmaxf(d, kWeightFloor), p->weighted);
    }
    p->sum += sum;
  }
}

template <bool kWeighted>
__device__ __forceinline__ void add_element(float x, float scale, Partial* p) {
  *p = combine(*p, {fmaxf(x, -FLT_MAX), 0, 0}, scale);
  const float d = (x - p->max) * scale, e = exp2_approx(d);
  p->sum += e;
  if (kWeighted) p->weighted = fmaf(e, fmaxf(d, kWeightFloor), p->weighted);
}

// Granules that a thread has in flight from global memory: with 1024 threads on a multiprocessor
// they are 64 KB, twice what covers the memory's latency at full bandwidth.
constexpr int kInFlight = 4;

// First sweep of one block over a whole row in global memory; this thread's part.
template <bool kWeighted, bool kCapped = false, class T>
__device__ __forceinline__ Partial sum_row(const T* row, int64_t size, float scale,
                                           float tanh_scale = 0) {
  const Split split = split_row(row, size);
  const int thread = threadIdx.x, threads = blockDim.x;
  Partial p = empty_partial();
  if (thread < split.loose()) {
    const float x = to_float(row[split.element(thread, size)]);
    add_element<kWeighted>(swept_logit<kCapped>(x, tanh_scale), scale, &p);
  }
  const Granule* granules = reinterpret_cast<const Granule*>(row + split.head);
  for (int64_t first = thread; first < split.granules; first += kInFlight * threads) {
    Granule step[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int64_t g = first + i * threads;
      step[i] = g < split.granules ? granules[g] : padding<T>();
    }
    add_granules<kWeighted, T, kCapped>(step, scale, &p, tanh_scale, split.granules - first);
  }
  return p;
}

// Second sweep: out_j = 2^d (factor + slope d) with d as in Partial, and `own` at the token itself;
// under a cap both times the derivative of y.
struct Gradient {
  float max, scale;
  float factor, slope, own;

  template <bool kSlope, bool kCapped = false>
  __device__ __forceinline__ float at(float x, float tanh_scale = 0) const {
    const CappedLogit y = kCapped ? capped_logit(x, tanh_scale) : CappedLogit{x, 1};
    const float d = (y.value - max) * scale, e = exp2_approx(d);
    const float out = kSlope ? e * fmaf(slope, fmaxf(d, kWeightFloor), factor) : e * factor;
    return kCapped ? out * y.slope : out;
  }

  template <bool kCapped>
  __device__ __forceinline__ float at_token(float x, float tanh_scale) const {
    return kCapped ? own * capped_logit(x, tanh_scale).slope : own;
  }
};

// Where the gradient of a row goes, granule by granule as its logits are split. T: type of the
// logits, U: of the gradient.
template <class T, class U>
struct Target {
  U* out;  // of the first granule's first element
  bool aligned;
  int64_t token_granule;  // -1 if the token is no element of a granule
  int token_element;      // within that granule

  __device__ Target(const Split& split, int64_t token, U* out_row)
      : out(out_row + split.head),
        aligned(reinterpret_cast<uintptr_t>(out) % sizeof(Packed<T, U>) == 0),
        token_granule(token < split.head ? -1 : (token - split.head) / kPerGranule<T>),
        token_element(static_cast<int>((token - split.head) % kPerGranule<T>)) {}

  // Index is an integer of the width that the caller's loop needs.
  template <bool kSlope, bool kCapped = false, class Index>
  __device__ __forceinline__ void write(Index g, const Granule& granule, const Gradient& gradient,
                                        float tanh_scale = 0) const {
    float x[kPerGranule<T>], logits[kPerGranule<T>];
    unpack<T>(granule, logits);
#pragma unroll
    for (int i = 0; i < kPerGranule<T>; ++i)
      x[i] = gradient.template at<kSlope, kCapped>(logits[i], tanh_scale);
    if (g == static_cast<Index>(token_granule)) {
#pragma unroll
      for (int i = 0; i < kPerGranule<T>; ++i)
        if (i == token_element) x[i] = gradient.template at_token<kCapped>(logits[i], tanh_scale);
    }
    if (aligned) {
      reinterpret_cast<Packed<T, U>*>(out)[g] = pack<T, U>(x);
    } else {
#pragma unroll
      for (int i = 0; i < kPerGranule<T>; ++i)
        from_float(x[i], out + g * int64_t{kPerGranule<T>} + i);
    }
  }
};

template <bool kSlope, bool kCapped = false, class U>
__device__ __forceinline__ void write_element(float x, const Gradient& gradient, bool is_token,
                                              U* out, float tanh_scale = 0) {
  from_float(is_token ? gradient.template at_token<kCapped>(x, tanh_scale)
                      : gradient.template at<kSlope, kCapped>(x, tanh_scale),
             out);
}

// Second sweep of one block over a whole row in global memory; `out` may be `row`. From the end to
// the beginning: what the first sweep read last is still in the L2 cache.
template <bool kSlope, bool kCapped = false, class T, class U>
__device__ __forceinline__ void write_row(const T* row, int64_t size, const Gradient& gradient,
                                          int64_t token, U* out, float tanh_scale = 0) {
  const Split split = split_row(row, size);
  const Target<T, U> target(split, token, out);
  const int thread = threadIdx.x, threads = blockDim.x;
  if (thread < split.loose()) {
    const int64_t i = split.element(thread, size);
    write_element<kSlope, kCapped>(to_float(row[i]), gradient, i == token, out + i, tanh_scale);
  }
  const Granule* granules = reinterpret_cast<const Granule*>(row + split.head);
  for (int64_t last = split.granules - 1 - thread; last >= 0; last -= kInFlight * threads) {
    Granule step[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i)
      if (last >= i * threads) step[i] = granules[last - i * threads];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i)
      if (last >= i * threads)
        target.template write<kSlope, kCapped>(last - i * threads, step[i], gradient, tanh_scale);
  }
}

// Fills a row with zeros, by `parts` blocks of which this is number `part`.
template <class T>
__device__ __forceinline__ void zero_row(T* out, int64_t size, int part, int parts) {
  const Split split = split_row(out, size);
  const int64_t thread = part * int64_t{blockDim.x} + threadIdx.x;
  if (thread < split.loose()) from_float(0, out + split.element(static_cast<int>(thread), size));
  Granule* granules = reinterpret_cast<Granule*>(out + split.head);
  for (int64_t g = thread; g < split.granules; g += int64_t{parts} * blockDim.x)
    granules[g] = Granule{};
}

// Enough threads for `per_thread` granules each, in whole warps; at least one per loose element.
inline int row_threads(int64_t granules, int per_thread, int max_threads) {
  const int64_t threads = ceil_div(ceil_div(granules, per_thread), kWarp) * kWarp;
  return static_cast<int>(std::clamp<int64_t>(threads, kWarp, max_threads));
}

}  // namespace spo
