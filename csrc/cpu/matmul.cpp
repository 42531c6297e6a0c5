// The product of two bf16 matrices with an fp32 result, which PyTorch does not have on the CPU.
// A thread takes a block of columns, packs the rows of B that make them into its cache, and runs
// all rows of A past it. So B is read once and nothing as large as B is written.
#include <algorithm>
#include <stdexcept>

#include "csrc/cpu/isa.h"
#include "csrc/cpu/matmul_bf16.h"
#include "csrc/cpu/parallel.h"
#include "csrc/ops.h"

namespace spo {
namespace {

constexpr int64_t kPacked = 256 << 10;  // bytes of B: a part of a core's L2 cache
constexpr int64_t kPieces = 8;          // of the columns, per thread, so that all end together

}  // namespace

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

}  // namespace spo
