// Products whose numbers have the same bits whatever rows, columns and threads stand beside them.
// BLAS libraries choose the order of a sum by the shape and the number of threads. Here a number is
// the sum over pieces of kDepth terms, in order, and each piece is summed term by term from 0.
//
// A block of B is packed into panels of kColumns and stays in the L2 cache; the rows of A pass it,
// a few at a time, widened to fp32 into the L1 cache.
#include "csrc/cpu/matmul_fixed.h"

#include "csrc/cpu/transpose.h"
#include "csrc/cpu/vec.h"
#include "csrc/ops.h"

namespace spo {

namespace SPO_ISA {

#if defined(SPO_ISA_AVX512)
constexpr int kVectors = 2, kMostRows = 14;  // 28 of the 32 registers hold sums
#elif defined(SPO_ISA_AVX2)
constexpr int kVectors = 2, kMostRows = 6;  // 12 of 16
#else
constexpr int kVectors = 1, kMostRows = 4;  // 8 of the 16 registers of four lanes
#endif
constexpr int64_t kColumns = kVectors * Vec::kLanes;
static_assert(kMostRows <= kFixedMostRows && kFixedWidth % kColumns == 0, "room for the tiles");

// The kRows x kColumns sums of one piece of the depth.
template <int kRows>
static void multiply_tile(const float* rows, const float* columns, int64_t depth, float* out) {
  Vec sum[kRows][kVectors];
#pragma GCC unroll 14
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kVectors; ++j) sum[i][j] = Vec::fill(0);
  for (int64_t k = 0; k < depth; ++k) {
    Vec right[kVectors];
    for (int j = 0; j < kVectors; ++j)
      right[j] = Vec::load(columns + k * kColumns + j * Vec::kLanes);
#pragma GCC unroll 14
    for (int i = 0; i < kRows; ++i) {
      const Vec left = Vec::fill(rows[i * kFixedStride + k]);
      for (int j = 0; j < kVectors; ++j) sum[i][j] = fma(left, right[j], sum[i][j]);
    }
  }
#pragma GCC unroll 14
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kVectors; ++j) sum[i][j].store(out + i * kColumns + j * Vec::kLanes);
}

using Tile = void (*)(const float*, const float*, int64_t, float*);
static Tile tile_of(int64_t height) {
  static constexpr Tile tiles[] = {
      multiply_tile<1>,  multiply_tile<2>,  multiply_tile<3>,  multiply_tile<4>,
#if !defined(SPO_ISA_PORTABLE)
      multiply_tile<5>,  multiply_tile<6>,
#endif
#if defined(SPO_ISA_AVX512)
      multiply_tile<7>,  multiply_tile<8>,  multiply_tile<9>,  multiply_tile<10>,
      multiply_tile<11>, multiply_tile<12>, multiply_tile<13>, multiply_tile<14>,
#endif
  };
  static_assert(sizeof(tiles) / sizeof(Tile) == kMostRows, "one tile for each height");
  return tiles[height - 1];
}

template <class T>
static void widen(const T* x, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + Vec::kLanes <= count; i += Vec::kLanes) Vec::load(x + i).store(out + i);
  for (; i < count; ++i) out[i] = to_float(x[i]);
}

// kColumns columns of B, of which `count` exist, to (depth, kColumns) with zeros behind them.
template <class T>
static void pack_panel(const T* b, int64_t stride, int64_t count, int64_t depth, float* out) {
  for (int64_t k = 0; k < depth; ++k, out += kColumns) {
    widen(b + k * stride, count, out);
    for (int64_t j = count; j < kColumns; ++j) out[j] = 0;
  }
}

// The same from B transposed, whose rows are the columns.
template <class T>
static void pack_transposed(const T* b, int64_t stride, int64_t count, int64_t depth, float* out) {
  for (int64_t j = 0; j < kColumns; j += Vec::kLanes) {
    int64_t k = 0;
    for (; j + Vec::kLanes <= count && k + Vec::kLanes <= depth; k += Vec::kLanes) {
      Vec square[Vec::kLanes];
      for (int i = 0; i < Vec::kLanes; ++i) square[i] = Vec::load(b + (j + i) * stride + k);
      transpose(square);
      for (int i = 0; i < Vec::kLanes; ++i) square[i].store(out + (k + i) * kColumns + j);
    }
    for (; k < depth; ++k)
      for (int64_t i = j; i < j + Vec::kLanes; ++i)
        out[k * kColumns + i] = i < count ? to_float(b[i * stride + k]) : 0;
  }
}

template <class A, class B>
static void multiply_block(const FixedMatmulArgs& a, int64_t row_begin, int64_t row_end,
                           int64_t begin, int64_t end, float* room) {
  float* const columns = room;
  float* const rows = columns + kFixedDepth * kFixedWidth;
  float* const sums = rows + kMostRows * kFixedStride;
  const auto* left = static_cast<const A*>(a.a);
  const auto* right = static_cast<const B*>(a.b);
  const int64_t panels = (row_end - row_begin + kMostRows - 1) / kMostRows;
  for (int64_t k = 0; k == 0 || k < a.depth; k += kFixedDepth) {  // once for a depth of 0
    const int64_t depth = a.depth - k < kFixedDepth ? a.depth - k : kFixedDepth;
    for (int64_t j = begin; j < end; j += kColumns) {
      const int64_t count = end - j < kColumns ? end - j : kColumns;
      float* const panel = columns + (j - begin) * kFixedDepth;
      if (a.b_transposed)
        pack_transposed(right + j * a.b_stride + k, a.b_stride, count, depth, panel);
      else
        pack_panel(right + k * a.b_stride + j, a.b_stride, count, depth, panel);
    }
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t first = row_begin + (row_end - row_begin) * p / panels;
      const int64_t height = row_begin + (row_end - row_begin) * (p + 1) / panels - first;
      for (int64_t i = 0; i < height; ++i)
        widen(left + (first + i) * a.a_stride + k, depth, rows + i * kFixedStride);
      const Tile tile = tile_of(height);
      for (int64_t j = begin; j < end; j += kColumns) {
        tile(rows, columns + (j - begin) * kFixedDepth, depth, sums);
        const int64_t count = end - j < kColumns ? end - j : kColumns;
        for (int64_t i = 0; i < height; ++i) {
          float* c = a.c + (first + i) * a.c_stride + j;
          const float* sum = sums + i * kColumns;
          for (int64_t n = 0; n < count; ++n) c[n] = k == 0 ? sum[n] : c[n] + sum[n];
        }
      }
    }
  }
}

template <class A>
static void multiply_any(const FixedMatmulArgs& a, int64_t row_begin, int64_t row_end,
                         int64_t begin, int64_t end, float* room) {
  if (a.b_dtype == kBFloat16)
    return multiply_block<A, BFloat16>(a, row_begin, row_end, begin, end, room);
  if (a.b_dtype == kFloat16)
    return multiply_block<A, Float16>(a, row_begin, row_end, begin, end, room);
  multiply_block<A, float>(a, row_begin, row_end, begin, end, room);
}

void fixed_block(const FixedMatmulArgs& a, int64_t row_begin, int64_t row_end, int64_t begin,
                 int64_t end, float* room) {
  if (a.a_dtype == kBFloat16)
    return multiply_any<BFloat16>(a, row_begin, row_end, begin, end, room);
  if (a.a_dtype == kFloat16) return multiply_any<Float16>(a, row_begin, row_end, begin, end, room);
  multiply_any<float>(a, row_begin, row_end, begin, end, room);
}

}  // namespace SPO_ISA
}  // namespace spo
