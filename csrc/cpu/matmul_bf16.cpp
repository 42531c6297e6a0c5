// The instructions of AVX512_BF16: this file alone is compiled for them (CMakeLists.txt), and
// matmul.cpp calls it where the processor has them. No std:: template here: see vec.h.
#include "csrc/cpu/matmul_bf16.h"

#include "csrc/cpu/matmul_fixed.h"

#ifdef __AVX512BF16__
#include <immintrin.h>

namespace spo {
namespace bf16 {
namespace {

constexpr int kLanes = 16;  // columns of one vector of sums
constexpr int kPair = 2;    // numbers along D that one instruction multiplies per column
constexpr int kVectors = kColumns / kLanes;

inline __m512i load_pairs(const uint16_t* p, int64_t count) {  // 16 pairs, zeros behind `count`
  if (count >= kPair * kLanes) return _mm512_loadu_si512(p);
  const auto mask = static_cast<__mmask32>((uint32_t{1} << (count > 0 ? count : 0)) - 1);
  return _mm512_maskz_loadu_epi16(mask, p);
}

inline void prefetch(const uint16_t* p, int64_t offset) {  // which may be behind the end
  _mm_prefetch(reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(p) + 2 * offset),
               _MM_HINT_T0);
}

// rows[i] holds 16 pairs of column i; afterwards rows[j] holds pair j of 16 columns.
inline void transpose(__m512i rows[kLanes]) {
  __m512i t[kLanes];
  for (int i = 0; i < kLanes; i += 2) {
    t[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < kLanes; i += 4) {
    for (int j = 0; j < 2; ++j) {
      rows[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + 2 + j]);
      rows[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + 2 + j]);
    }
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    rows[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    rows[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

struct Ahead {  // rows of B to bring into the cache meanwhile
  const uint16_t* first;
  int64_t count;
};

// kRows x kColumns numbers of C, of which `columns` are stored.
template <int kRows>
void multiply_tile(const MatmulArgs& args, const uint32_t* a, const uint32_t* b, float* c,
                   int64_t columns, const Ahead& ahead) {
  __m512 sum[kRows][kVectors];
  for (auto& row : sum)
    for (auto& x : row) x = _mm512_setzero_ps();
  const int64_t pairs = num_pairs(args);
  for (int64_t k = 0; k < pairs; ++k, a += kRows, b += kColumns) {
    if (k % kLanes == 0)  // where a cache line starts
      for (int64_t i = 0; i < ahead.count; ++i)
        prefetch(ahead.first, i * args.b_stride + kPair * k);
    __m512bh right[kVectors];
    for (int j = 0; j < kVectors; ++j)
      right[j] = reinterpret_cast<__m512bh>(_mm512_load_si512(b + j * kLanes));
    for (int i = 0; i < kRows; ++i) {
      const auto left = reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(a[i])));
      for (int j = 0; j < kVectors; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], left, right[j]);
    }
  }
  const uint32_t last = columns < kColumns ? (uint32_t{1} << columns) - 1 : ~uint32_t{0};
#pragma GCC unroll 14  // so that the sums stay in registers
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kVectors; ++j)
      _mm512_mask_storeu_ps(c + i * args.c_stride + j * kLanes,
                            static_cast<__mmask16>(last >> j * kLanes), sum[i][j]);
}

using Tile = void (*)(const MatmulArgs&, const uint32_t*, const uint32_t*, float*, int64_t,
                      const Ahead&);
constexpr Tile kTiles[] = {
    multiply_tile<1>,  multiply_tile<2>,  multiply_tile<3>,  multiply_tile<4>, multiply_tile<5>,
    multiply_tile<6>,  multiply_tile<7>,  multiply_tile<8>,  multiply_tile<9>, multiply_tile<10>,
    multiply_tile<11>, multiply_tile<12>, multiply_tile<13>, multiply_tile<14>};
static_assert(sizeof(kTiles) / sizeof(Tile) == kMostRows, "one tile for each height");

// kColumns columns of B (depth, columns), of which `count` exist, to (pairs, kColumns) with zeros
// behind them.
void pack_panel(const uint16_t* b, int64_t stride, int64_t count, int64_t depth, uint32_t* packed) {
  for (int64_t k = 0; k < depth; k += kPair, packed += kColumns) {
    for (int64_t j = 0; j < kColumns; j += kLanes) {
      const int64_t width = count - j < 0 ? 0 : count - j < kLanes ? count - j : kLanes;
      const auto mask = static_cast<__mmask16>((uint32_t{1} << width) - 1);
      const auto load = [&](int64_t row) {
        return row < depth
                   ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, b + row * stride + j))
                   : _mm512_setzero_si512();
      };
      const __m512i high = _mm512_slli_epi32(load(k + 1), 16);
      _mm512_store_si512(packed + j, _mm512_or_si512(load(k), high));
    }
  }
}

constexpr int64_t kPieceDepth = kPair * kFixedDepth;  // in as much room as fp32 takes
static_assert(kMostRows <= kFixedMostRows && kColumns <= kFixedWidth, "room for the tiles");

}  // namespace

void pack_rows(const MatmulArgs& args, int64_t begin, int64_t end, uint32_t* packed) {
  const int64_t height = end - begin, pairs = num_pairs(args);
  for (int64_t i = 0; i < height; ++i) {
    const auto* row = static_cast<const uint16_t*>(args.a) + (begin + i) * args.a_stride;
    for (int64_t k = 0; k < pairs; ++k) {
      const uint32_t high = kPair * k + 1 < args.depth ? row[kPair * k + 1] : 0;
      packed[k * height + i] = high << 16 | row[kPair * k];
    }
  }
}

void pack_columns(const MatmulArgs& args, int64_t begin, int64_t end, uint32_t* packed) {
  const int64_t pairs = num_pairs(args);
  const auto* weight = static_cast<const uint16_t*>(args.b);
  for (int64_t column = begin; column < end; column += kLanes) {
    uint32_t* out = packed + (column - begin) / kColumns * kColumns * pairs;
    out += (column - begin) % kColumns;
    for (int64_t k = 0; k < pairs; k += kLanes) {
      __m512i rows[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const int64_t count = column + i < end ? args.depth - kPair * k : 0;
        rows[i] = count > 0 ? load_pairs(weight + (column + i) * args.b_stride + kPair * k, count)
                            : _mm512_setzero_si512();
      }
      // Sixteen streams at once are more than the processor foresees.
      for (int i = 0; i < kLanes; ++i)
        prefetch(weight, (column + kLanes + i) * args.b_stride + kPair * k);
      transpose(rows);
      for (int i = 0; i < kLanes && k + i < pairs; ++i)
        _mm512_store_si512(out + (k + i) * kColumns, rows[i]);
    }
  }
}

void multiply(const MatmulArgs& args, const uint32_t* rows, const uint32_t* columns, int64_t begin,
              int64_t end, int64_t next_end) {
  const int64_t pairs = num_pairs(args), panels = num_row_panels(args);
  const int64_t tiles = panels * ((end - begin + kColumns - 1) / kColumns);
  const auto* next = static_cast<const uint16_t*>(args.b) + end * args.b_stride;
  int64_t done = 0, fetched = 0;
  for (int64_t p = 0; p < panels; ++p) {
    const int64_t first = first_row(args, p), height = first_row(args, p + 1) - first;
    const Tile tile = kTiles[height - 1];
    for (int64_t column = begin; column < end; column += kColumns) {
      const int64_t until = ++done * (next_end - end) / tiles;
      tile(args, rows + first * pairs, columns + (column - begin) * pairs,
           args.c + first * args.c_stride + column, end - column,
           {next + fetched * args.b_stride, until - fetched});
      fetched = until;
    }
  }
}

void fixed_block(const FixedMatmulArgs& args, int64_t row_begin, int64_t row_end, int64_t begin,
                 int64_t end, float* room) {
  auto* const columns = reinterpret_cast<uint32_t*>(room);
  auto* const rows = columns + kFixedDepth * kFixedWidth;
  float* const sums = room + kFixedDepth * kFixedWidth + kFixedMostRows * kFixedStride;
  MatmulArgs piece;  // of the depth, of which the sums are added to C in order
  piece.rows = row_end - row_begin;
  piece.a_stride = args.a_stride;
  piece.c_stride = kColumns;
  for (int64_t k = 0; k == 0 || k < args.depth; k += kPieceDepth) {  // once for a depth of 0
    piece.depth = args.depth - k < kPieceDepth ? args.depth - k : kPieceDepth;
    piece.a = static_cast<const uint16_t*>(args.a) + row_begin * args.a_stride + k;
    const auto* b = static_cast<const uint16_t*>(args.b) + k * args.b_stride;
    for (int64_t j = begin; j < end; j += kColumns)
      pack_panel(b + j, args.b_stride, end - j, piece.depth, columns + (j - begin) * kFixedDepth);
    const int64_t panels = num_row_panels(piece);
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t first = first_row(piece, p), height = first_row(piece, p + 1) - first;
      pack_rows(piece, first, first + height, rows);
      for (int64_t j = begin; j < end; j += kColumns) {
        kTiles[height - 1](piece, rows, columns + (j - begin) * kFixedDepth, sums, kColumns, {});
        const int64_t count = end - j < kColumns ? end - j : kColumns;
        for (int64_t i = 0; i < height; ++i) {
          float* c = args.c + (row_begin + first + i) * args.c_stride + j;
          for (int64_t n = 0; n < count; ++n)
            c[n] = k == 0 ? sums[i * kColumns + n] : c[n] + sums[i * kColumns + n];
        }
      }
    }
  }
}

}  // namespace bf16
}  // namespace spo
#endif
