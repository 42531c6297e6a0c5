#pragma once
// The parts of matmul_bf16_cpu and matmul_fixed_cpu that need AVX512_BF16. Operands are packed to
// 32-bit pairs of neighbours along D, which one instruction multiplies and adds.
#include "csrc/ops.h"

namespace spo {
namespace bf16 {

// A tile of 14 x 32 sums takes 28 of the 32 vector registers.
constexpr int64_t kMostRows = 14, kColumns = 32;

static inline int64_t num_pairs(const MatmulArgs& args) { return (args.depth + 1) / 2; }

// The rows are cut into panels of equal height, or one less.
static inline int64_t num_row_panels(const MatmulArgs& args) {
  return (args.rows + kMostRows - 1) / kMostRows;
}
static inline int64_t first_row(const MatmulArgs& args, int64_t panel) {
  return args.rows * panel / num_row_panels(args);
}

// Rows [begin, end) of A, one panel, to (pairs, end - begin).
void pack_rows(const MatmulArgs& args, int64_t begin, int64_t end, uint32_t* packed);

// Columns [begin, end) of the product, that is rows of B, to panels of (pairs, kColumns), with
// zeros behind the last. `packed` is aligned to 64 bytes, `begin` divides by kColumns.
void pack_columns(const MatmulArgs& args, int64_t begin, int64_t end, uint32_t* packed);

// Columns [begin, end) of C, from all packed rows and these packed columns. Meanwhile the rows
// [end, next_end) of B, which are packed next, come into the cache.
void multiply(const MatmulArgs& args, const uint32_t* rows, const uint32_t* columns, int64_t begin,
              int64_t end, int64_t next_end);

// A block of rows and columns of matmul_fixed, of bf16 matrices of which B is not transposed.
// `room` holds kFixedRoom floats.
void fixed_block(const FixedMatmulArgs& args, int64_t row_begin, int64_t row_end, int64_t begin,
                 int64_t end, float* room);

}  // namespace bf16
}  // namespace spo
