// The product of two bf16 matrices with an fp32 result, which PyTorch does not have on the CPU.
// A thread takes a block of columns, packs the rows of B that make them into its cache, and runs
// all rows of A past it. So B is read once and nothing as large as B is written.
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <stdexcept>

#include "csrc/cpu/isa.h"
#include "csrc/cpu/matmul_bf16.h"
#include "csrc/cpu/parallel.h"
#include "csrc/ops.h"

namespace spo {
namespace {

constexpr int64_t kAlignment = 64;      // bytes, of a vector
constexpr int64_t kPacked = 256 << 10;  // bytes of B: a part of a core's L2 cache

// Memory of the calling thread for packed operands, kept for its next call.
class Workspace {
 public:
  uint32_t* at_least(int64_t count) {
    if (count > size_) {
      const int64_t bytes = count * static_cast<int64_t>(sizeof(uint32_t));
      data_.reset(
          std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment));
      if (!data_) throw std::bad_alloc();
      size_ = count;
    }
    return static_cast<uint32_t*>(data_.get());
  }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> data_;
  int64_t size_ = 0;
};

}  // namespace

void matmul_bf16_cpu(const MatmulArgs& args) {
  if (!has_bf16_products())
    throw std::runtime_error("matmul_bf16: this processor does not have AVX512_BF16");
#ifdef SPO_AVX512_BF16
  if (args.rows <= 0 || args.columns <= 0) return;
  static thread_local Workspace of_rows;
  static thread_local Workspace of_columns;
  const int64_t pairs = bf16::num_pairs(args);
  uint32_t* rows = of_rows.at_least(args.rows * pairs);
  parallel_for(bf16::num_row_panels(args), 1, args.num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t first = bf16::first_row(args, p);
      bf16::pack_rows(args, first, bf16::first_row(args, p + 1), rows + first * pairs);
    }
  });
  const int64_t panel = bf16::kColumns * pairs * static_cast<int64_t>(sizeof(uint32_t));
  const int64_t width =
      bf16::kColumns * std::max<int64_t>(1, kPacked / std::max<int64_t>(1, panel));
  parallel_for(args.columns, width, args.num_threads, [&](int64_t begin, int64_t end) {
    uint32_t* columns = of_columns.at_least(width * pairs);
    bf16::pack_columns(args, begin, end, columns);
    bf16::multiply(args, rows, columns, begin, end);
  });
#endif
}

}  // namespace spo
