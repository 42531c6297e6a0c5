// The product of bf16 matrices against sums in double. Every buffer is exactly as large as it must
// be, so that the sanitizers see a read or write beside it.
#include <cstring>
#include <random>
#include <vector>

#include "csrc/cpu/isa.h"
#include "csrc/ops.h"
#include "csrc/tests/check.h"

namespace {

float to_float(uint16_t bits) {
  const uint32_t wide = uint32_t{bits} << 16;
  float x;
  std::memcpy(&x, &wide, sizeof x);
  return x;
}

// Numbers of magnitude 0.5 to 4 and either sign, of any mantissa.
std::vector<uint16_t> numbers(int64_t size, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<uint16_t> out(size);
  for (uint16_t& x : out)
    x = static_cast<uint16_t>((random() & 0x807f) | (126 + random() % 3) << 7);
  return out;
}

// `spare`: how much longer than its contents a row of each matrix is.
void check_product(int64_t rows, int64_t columns, int64_t depth, int64_t spare, int32_t threads) {
  spo::MatmulArgs args;
  args.rows = rows;
  args.columns = columns;
  args.depth = depth;
  args.a_stride = args.b_stride = depth + spare;
  args.c_stride = columns + spare;
  const auto size = [&](int64_t count, int64_t length) {
    return count > 0 ? (count - 1) * (length + spare) + length : 0;
  };
  const auto a = numbers(size(rows, depth), 1), b = numbers(size(columns, depth), 2);
  std::vector<float> c(size(rows, columns), -1);
  args.a = a.data();
  args.b = b.data();
  args.c = c.data();
  std::vector<uint32_t> packed(rows * ((depth + 1) / 2));
  args.packed = packed.data();
  args.num_threads = threads;
  spo::matmul_bf16_cpu(args);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      double want = 0, magnitude = 0;
      for (int64_t k = 0; k < depth; ++k) {
        const double term = static_cast<double>(to_float(a[i * args.a_stride + k])) *
                            to_float(b[j * args.b_stride + k]);
        want += term;
        magnitude += std::abs(term);
      }
      CHECK_NEAR(c[i * args.c_stride + j], want, 1e-6 * magnitude, "product");
    }
    for (int64_t j = columns; j < args.c_stride && i + 1 < rows; ++j)
      CHECK(c[i * args.c_stride + j] == -1);
  }
}

}  // namespace

int main() {
  if (!spo::has_bf16_products()) {
    std::fprintf(stderr, "this processor has no AVX512_BF16: ");
    return spo::check::finish("test_matmul");
  }
  for (int64_t rows : {1, 14, 15, 29})
    for (int64_t columns : {1, 16, 31, 33, 97})
      for (int64_t depth : {1, 2, 31, 32, 35, 64})
        check_product(rows, columns, depth, depth % 2, 1);
  check_product(43, 1000, 130, 0, 3);
  check_product(5, 70, 5000, 1, 2);  // a panel of columns larger than a block
  for (int64_t empty : {0, 1, 2})
    check_product(empty == 0 ? 0 : 3, empty == 1 ? 0 : 3, empty == 2 ? 0 : 3, 0, 2);
  return spo::check::finish("test_matmul");
}
