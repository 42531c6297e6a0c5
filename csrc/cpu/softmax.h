#pragma once
// The two sweeps over a logits row that the policy-loss and logprob kernels share. A sweep works on
// pieces that fit the L1 cache; a row of 151936 logits still fits the L2 or L3 cache, so the second
// sweep does not go to memory. Sums are fp32 within a piece and fp64 across pieces.
//
// Exponentials are to base 2: 2^d with d = (x - max) * scale, scale = log2(e) / temperature.
#include <cfloat>
#include <cmath>
#include <cstdint>

#include "csrc/cpu/vec.h"
#include "csrc/ops.h"

namespace spo {
namespace SPO_ISA {

constexpr int64_t kPiece = 1024;      // elements; a multiple of 4 vectors of every width
constexpr float kWeightFloor = -160;  // 2 to it is 0, so that 0 * -inf never happens
constexpr double kLn2 = 0.693147180559945309;

static inline float exponent_scale(float temperature) { return 1.44269504088896341f / temperature; }

struct RowSums {
  float max;        // of the raw logits
  double sum;       // of 2^d
  double weighted;  // of 2^d d; 0 unless asked for
};

static inline void fill_padding(float* p) { *p = -INFINITY; }
static inline void fill_padding(BFloat16* p) { p->bits = 0xff80; }
static inline void fill_padding(Float16* p) { p->bits = 0xfc00; }

template <class T>
static float piece_max(const T* x, int64_t size) {
  Vec m[4];
  for (int k = 0; k < 4; ++k) m[k] = Vec::load(x + k * Vec::kLanes);
  for (int64_t i = 4 * Vec::kLanes; i < size; i += 4 * Vec::kLanes)
    for (int k = 0; k < 4; ++k) m[k] = max(m[k], Vec::load(x + i + k * Vec::kLanes));
  return max(max(m[0], m[1]), max(m[2], m[3])).largest();
}

template <bool kWeighted, class T>
static void piece_sums(const T* x, int64_t size, float row_scale, RowSums* row) {
  const Vec top = Vec::fill(row->max), scale = Vec::fill(row_scale);
  const Vec floor = Vec::fill(kWeightFloor);
  Vec sum[4], weighted[4];
  for (int k = 0; k < 4; ++k) sum[k] = weighted[k] = Vec::fill(0);
  for (int64_t i = 0; i < size; i += 4 * Vec::kLanes) {
    for (int k = 0; k < 4; ++k) {
      const Vec d = (Vec::load(x + i + k * Vec::kLanes) - top) * scale;
      const Vec e = exp2(d);
      sum[k] = sum[k] + e;
      if (kWeighted) weighted[k] = fma(e, max(floor, d), weighted[k]);
    }
  }
  row->sum += ((sum[0] + sum[1]) + (sum[2] + sum[3])).sum();
  if (kWeighted) row->weighted += ((weighted[0] + weighted[1]) + (weighted[2] + weighted[3])).sum();
}

template <bool kWeighted, class T>
static void add_piece(const T* x, int64_t size, float scale, RowSums* row) {
  const float m = piece_max(x, size);
  if (m > row->max) {
    const double delta = (static_cast<double>(row->max) - m) * scale, rescale = ::exp2(delta);
    if (kWeighted) row->weighted = rescale * (row->weighted + delta * row->sum);
    row->sum *= rescale;
    row->max = m;
  }
  piece_sums<kWeighted>(x, size, scale, row);
}

// First sweep: running max and sums. The maximum starts at the lowest float, not at -inf, because a
// row may start with -inf. The maximum ignores NaN; the sums do not.
template <bool kWeighted, class T>
static RowSums reduce_row(const T* x, int64_t size, float scale) {
  RowSums row = {-FLT_MAX, 0, 0};
  int64_t begin = 0;
  for (; begin + kPiece <= size; begin += kPiece)
    add_piece<kWeighted>(x + begin, kPiece, scale, &row);
  if (begin < size) {
    T tail[kPiece];
    int64_t filled = 0;
    for (; begin + filled < size; ++filled) tail[filled] = x[begin + filled];
    for (; filled % (4 * Vec::kLanes) != 0; ++filled) fill_padding(tail + filled);
    add_piece<kWeighted>(tail, filled, scale, &row);
  }
  return row;
}

template <class T>
static RowSums reduce_row(const T* x, int64_t size, float scale, bool weighted) {
  return weighted ? reduce_row<true>(x, size, scale) : reduce_row<false>(x, size, scale);
}

static inline double row_logprob(const RowSums& row, float logit, float scale) {
  return kLn2 * scale * (static_cast<double>(logit) - row.max) - ::log(row.sum);
}

static inline double row_entropy(const RowSums& row) {
  return ::log(row.sum) - kLn2 * row.weighted / row.sum;
}

// Second sweep: out_j = 2^d_j (factor + slope d_j). `out` may be `x`.
template <bool kSlope, class T, class U>
static void write_row(const T* x, int64_t size, float row_max, float row_scale, float factor,
                      float slope, U* out) {
  const Vec top = Vec::fill(row_max), scale = Vec::fill(row_scale);
  const Vec a = Vec::fill(factor), b = Vec::fill(slope), floor = Vec::fill(kWeightFloor);
  const auto value = [&](const T* p) {
    const Vec d = (Vec::load(p) - top) * scale;
    return kSlope ? exp2(d) * fma(b, max(floor, d), a) : exp2(d) * a;
  };
  int64_t i = 0;
  for (; i + Vec::kLanes <= size; i += Vec::kLanes) value(x + i).store(out + i);
  if (i < size) {
    T tail[Vec::kLanes];
    for (int k = 0; k < Vec::kLanes; ++k) {
      fill_padding(tail + k);
      if (i + k < size) tail[k] = x[i + k];
    }
    U rest[Vec::kLanes];
    value(tail).store(rest);
    for (int k = 0; i + k < size; ++k) out[i + k] = rest[k];
  }
}

template <class T>
static const T* row_of(const void* base, const RowLayout& layout, int64_t row) {
  return static_cast<const T*>(base) + row_offset(layout, row);
}

template <class T>
static T* row_of(void* base, const RowLayout& layout, int64_t row) {
  return static_cast<T*>(base) + row_offset(layout, row);
}

}  // namespace SPO_ISA
}  // namespace spo
