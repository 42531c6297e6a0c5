// The launchers of the matrix products.
#include <algorithm>
#include <stdexcept>

#include "csrc/cpu/isa.h"
#include "csrc/cpu/matmul_bf16.h"
#include "csrc/cpu/matmul_fixed.h"
#include "csrc/cpu/parallel.h"
#include "csrc/ops.h"

namespace spo {

SPO_PER_ISA(void, fixed_block, (const FixedMatmulArgs&, int64_t, int64_t, int64_t, int64_t, float*))

namespace {

constexpr int64_t kPacked = 256 << 10;  // bytes of B: a part of a core's L2 cache
constexpr int64_t kPieces = 8;          // of the columns, per thread, so that all end together

}  // namespace

// The product of two bf16 matrices with an fp32 result, which PyTorch does not have on the CPU.
// A thread takes a block of columns, packs the rows of B that make them into its cache, and runs
// all rows of A past it. So B is read once and nothing as large as B is written.
void matmul_bf16_cpu(const MatmulArgs& args) {
  if (!has_bf16_products())
    throw std::runtime_error("matmul_bf16: this processor does not have AVX512_BF16");
#ifdef SPO_AVX512_BF16
  if (args.rows <= 0 || args.columns <= 0) return;
  const int64_t pairs = bf16::num_pairs(args);
  auto* rows = static_cast<uint32_t*>(args.packed);
  torch_parallel_for(
      bf16::num_row_panels(args), 1, args.num_threads, [&](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; ++p) {
          const int64_t first = bf16::first_row(args, p);
          bf16::pack_rows(args, first, bf16::first_row(args, p + 1), rows + first * pairs);
        }
      });
  const int64_t panel = bf16::kColumns * pairs * static_cast<int64_t>(sizeof(uint32_t));
  const int64_t width =
      bf16::kColumns * std::max<int64_t>(1, kPacked / std::max<int64_t>(1, panel));
  // A thread takes several blocks at a time: only it can fetch its next one early.
  const int64_t blocks = args.columns / (width * kPieces * std::max(1, args.num_threads));
  const int64_t piece = width * std::max<int64_t>(1, blocks);
  torch_parallel_for(args.columns, piece, args.num_threads, [&](int64_t begin, int64_t end) {
    auto* columns = static_cast<uint32_t*>(thread_buffer(width * pairs * sizeof(uint32_t)));
    for (int64_t next; begin < end; begin = next) {
      next = std::min(end, begin + width);
      bf16::pack_columns(args, begin, next, columns);
      bf16::multiply(args, rows, columns, begin, next, std::min(end, next + width));
    }
  });
#endif
}

// A block of B is packed for each block of rows anew, so the rows are only cut where the columns
// alone do not occupy the threads.
void matmul_fixed_cpu(const FixedMatmulArgs& args) {
  if (args.rows <= 0 || args.columns <= 0) return;
  auto block = fixed_block_for(chosen_isa());
#ifdef SPO_AVX512_BF16
  const bool halves = args.a_dtype == kBFloat16 && args.b_dtype == kBFloat16;
  if (halves && !args.b_transposed && has_bf16_products()) block = bf16::fixed_block;
#endif
  const auto ceil = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t threads = std::max(1, args.num_threads);
  int64_t width = kFixedWidth, height = args.rows;
  const auto blocks = [&] { return ceil(args.columns, width) * ceil(args.rows, height); };
  while (blocks() < 2 * threads && height > 8 * kFixedMostRows) height = ceil(height, 2);
  while (blocks() < threads && width > 32) width /= 2;
  const int64_t across = ceil(args.columns, width);
  torch_parallel_for(blocks(), 1, args.num_threads, [&](int64_t begin, int64_t end) {
    auto* room = static_cast<float*>(thread_buffer(kFixedRoom * sizeof(float)));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / across * height, column = i % across * width;
      block(args, row, std::min(args.rows, row + height), column,
            std::min(args.columns, column + width), room);
    }
  });
}

}  // namespace spo
