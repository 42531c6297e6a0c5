#pragma once
// The two sweeps over a logits row that the policy-loss and logprob kernels share. A sweep works on
// pieces that fit the L1 cache; a row of 151936 logits still fits the L2 or L3 cache, so the second
// sweep does not go to memory. Sums are fp32 within a piece and fp64 across pieces.
//
// Exponentials are to base 2: 2^d with d = (x - max) * scale, scale = log2(e) / temperature.
//
// A soft cap c of logits times s: with k = s / c, all of this works on y = tanh(k x) in place of x,
// at the temperature divided by c. Gradients by x are those by y times k (1 - y^2). The k is called
// tanh_scale; it is 0 without a cap.
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
  float max;        // of the raw logits, or of y
  double sum;       // of 2^d
  double weighted;  // of 2^d d; 0 unless asked for
};

struct CappedLogit {
  float value, slope;  // y and its derivative by x; x and 1 without a cap
};

static inline CappedLogit capped_logit(float x, float tanh_scale) {
  if (tanh_scale == 0) return {x, 1};
  const Tanh y = tanh(Vec::fill(x * tanh_scale));  // to the last bit as the sweeps find it
  return {y.value.largest(), y.slope.largest() * tanh_scale};
}

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

// As add_piece, on the y of a piece, `padded` elements of which `size` count. One buffer per piece
// instead of a tanh per sweep over it.
template <bool kWeighted, class T>
static void add_capped_piece(const T* x, int64_t padded, int64_t size, float scale,
                             float tanh_scale, RowSums* row) {
  float y[kPiece];
  const Vec k = Vec::fill(tanh_scale);
  for (int64_t i = 0; i < padded; i += Vec::kLanes) tanh(Vec::load(x + i) * k).value.store(y + i);
  for (int64_t i = size; i < padded; ++i) fill_padding(y + i);  // the tanh of -inf would count
  add_piece<kWeighted>(y, padded, scale, row);
}

// First sweep: running max and sums. The maximum starts at the lowest float, not at -inf, because a
// row may start with -inf. The maximum ignores NaN; the sums do not.
template <bool kWeighted, bool kCapped, class T>
static RowSums reduce_row(const T* x, int64_t size, float scale, float tanh_scale) {
  RowSums row = {-FLT_MAX, 0, 0};
  const auto add = [&](const T* piece, int64_t padded, int64_t count) {
    if (kCapped) {
      add_capped_piece<kWeighted>(piece, padded, count, scale, tanh_scale, &row);
    } else {
      add_piece<kWeighted>(piece, padded, scale, &row);
    }
  };
  int64_t begin = 0;
  for (; begin + kPiece <= size; begin += kPiece) add(x + begin, kPiece, kPiece);
  if (begin < size) {
    T tail[kPiece];
    int64_t filled = 0;
    for (; begin + filled < size; ++filled) tail[filled] = x[begin + filled];
    for (; filled % (4 * Vec::kLanes) != 0; ++filled) fill_padding(tail + filled);
    add(tail, filled, size - begin);
  }
  return row;
}

template <class T>
static RowSums reduce_row(const T* x, int64_t size, float scale, bool weighted,
                          float tanh_scale = 0) {
  if (tanh_scale == 0)
    return weighted ? reduce_row<true, false>(x, size, scale, 0)
                    : reduce_row<false, false>(x, size, scale, 0);
  return weighted ? reduce_row<true, true>(x, size, scale, tanh_scale)
                  : reduce_row<false, true>(x, size, scale, tanh_scale);
}

// `logit`: the value of its capped_logit.
static inline double row_logprob(const RowSums& row, float logit, float scale) {
  return kLn2 * scale * (static_cast<double>(logit) - row.max) - ::log(row.sum);
}

static inline double row_entropy(const RowSums& row) {
  return ::log(row.sum) - kLn2 * row.weighted / row.sum;
}

// Second sweep: out_j = 2^d_j (factor + slope d_j), times k (1 - y_j^2) under a cap. `out` may be
// `x`. The caller overwrites the element of the token, whose value it must compute before.
template <bool kSlope, bool kCapped, class T, class U>
static void write_row(const T* x, int64_t size, float row_max, float row_scale, float factor,
                      float slope, U* out, float tanh_scale) {
  const Vec top = Vec::fill(row_max), scale = Vec::fill(row_scale), k = Vec::fill(tanh_scale);
  const Vec a = Vec::fill(factor), b = Vec::fill(slope), floor = Vec::fill(kWeightFloor);
  const auto value = [&](const T* p) {
    const Vec logit = Vec::load(p);
    const Tanh y = kCapped ? tanh(logit * k) : Tanh{logit, logit};
    const Vec d = (y.value - top) * scale;
    const Vec by_y = kSlope ? exp2(d) * fma(b, max(floor, d), a) : exp2(d) * a;
    return kCapped ? by_y * (y.slope * k) : by_y;
  };
  int64_t i = 0;
  for (; i + Vec::kLanes <= size; i += Vec::kLanes) value(x + i).store(out + i);
  if (i < size) {
    T tail[Vec::kLanes];
    for (int j = 0; j < Vec::kLanes; ++j) {
      fill_padding(tail + j);
      if (i + j < size) tail[j] = x[i + j];
    }
    U rest[Vec::kLanes];
    value(tail).store(rest);
    for (int j = 0; i + j < size; ++j) out[i + j] = rest[j];
  }
}

template <bool kSlope, class T, class U>
static void write_row(const T* x, int64_t size, float row_max, float row_scale, float factor,
                      float slope, U* out, float tanh_scale = 0) {
  if (tanh_scale == 0) {
    write_row<kSlope, false>(x, size, row_max, row_scale, factor, slope, out, 0);
  } else {
    write_row<kSlope, true>(x, size, row_max, row_scale, factor, slope, out, tanh_scale);
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
