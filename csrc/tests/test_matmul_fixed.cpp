// Products whose bits do not depend on the batch: against sums in double, and among each other.
// Every buffer is exactly as large as it must be, so that the sanitizers see what lies beside it.
#include <cstdlib>
#include <cstring>
#include <random>
#include <stdexcept>
#include <vector>

#include "csrc/cpu/isa.h"
#include "csrc/ops.h"
#include "csrc/tests/check.h"

namespace {

// Multiples of 1/16 in [-4, 4), which all three types hold.
struct Matrix {
  std::vector<float> values;
  std::vector<unsigned char> bytes;
  int64_t stride;
  int32_t dtype;

  Matrix(int64_t rows, int64_t columns, int64_t spare, int32_t type, uint32_t seed)
      : stride(columns + spare), dtype(type) {
    std::mt19937 random(seed);
    const int64_t size = rows > 0 ? (rows - 1) * stride + columns : 0;
    for (int64_t i = 0; i < size; ++i)
      values.push_back((static_cast<int>(random() % 128) - 64) / 16.0f);
    const int64_t width = type == spo::kFloat32 ? 4 : 2;
    bytes.resize(size * width);
    for (int64_t i = 0; i < size; ++i) {
      uint32_t bits;
      std::memcpy(&bits, &values[i], sizeof bits);
      if (type == spo::kBFloat16) bits >>= 16;
      if (type == spo::kFloat16 && values[i] != 0)  // normal in both: move the exponent's bias
        bits = (bits >> 16 & 0x8000) | ((bits & 0x7fffffff) - 0x38000000) >> 13;
      std::memcpy(&bytes[i * width], &bits, width);
    }
  }
  double at(int64_t i, int64_t j) const { return values[i * stride + j]; }
};

struct Shape {
  int64_t rows, columns, depth, spare;
};

std::vector<float> product(const Shape& s, const Matrix& a, const Matrix& b, bool transposed,
                           int64_t first, int64_t rows, int32_t threads) {
  spo::FixedMatmulArgs args;
  args.rows = rows;
  args.columns = s.columns;
  args.depth = s.depth;
  args.a = a.bytes.data() + first * a.stride * (a.dtype == spo::kFloat32 ? 4 : 2);
  args.a_dtype = a.dtype;
  args.a_stride = a.stride;
  args.b = b.bytes.data();
  args.b_dtype = b.dtype;
  args.b_stride = b.stride;
  args.b_transposed = transposed;
  args.c_stride = s.columns + s.spare;
  std::vector<float> c(rows > 0 ? (rows - 1) * args.c_stride + s.columns : 0, -1);
  args.c = c.data();
  args.num_threads = threads;
  spo::matmul_fixed_cpu(args);
  return c;
}

void check_product(const Shape& s, int32_t a_type, int32_t b_type, bool transposed) {
  const Matrix a(s.rows, s.depth, s.spare, a_type, 1);
  const Matrix b(transposed ? s.columns : s.depth, transposed ? s.depth : s.columns, s.spare,
                 b_type, 2);
  const std::vector<float> c = product(s, a, b, transposed, 0, s.rows, 1);
  const int64_t stride = s.columns + s.spare;
  for (int64_t i = 0; i < s.rows; ++i) {
    for (int64_t j = 0; j < s.columns; ++j) {
      double want = 0, magnitude = 0;
      for (int64_t k = 0; k < s.depth; ++k) {
        const double term = a.at(i, k) * (transposed ? b.at(j, k) : b.at(k, j));
        want += term;
        magnitude += std::abs(term);
      }
      CHECK_NEAR(c[i * stride + j], want, 1e-6 * magnitude, "product");
    }
    for (int64_t j = s.columns; j < stride && i + 1 < s.rows; ++j) CHECK(c[i * stride + j] == -1);
  }
  // Any rows of it, on any threads, have the same bits.
  for (int64_t rows : {int64_t{1}, s.rows / 2, s.rows}) {
    if (rows == 0 || rows > s.rows || s.columns == 0) continue;
    const int64_t first = s.rows - rows;
    const std::vector<float> part = product(s, a, b, transposed, first, rows, 3);
    for (int64_t i = 0; i < rows; ++i)
      CHECK(!std::memcmp(&part[i * stride], &c[(first + i) * stride], s.columns * sizeof(float)));
  }
}

}  // namespace

int main() {
  for (const char* isa : {"portable", "avx2", "avx512"}) {
    setenv("SPO_CPU_ISA", isa, 1);
    try {
      spo::chosen_isa();
    } catch (const std::runtime_error&) {
      continue;  // not on this processor
    }
    for (bool transposed : {false, true}) {
      for (int64_t rows : {1, 14, 15, 29})
        for (int64_t columns : {1, 16, 31, 33})
          for (int64_t depth : {1, 17, 32, 300})
            check_product({rows, columns, depth, depth % 2}, spo::kFloat32, spo::kFloat32,
                          transposed);
      for (int32_t a : {spo::kFloat32, spo::kBFloat16, spo::kFloat16})
        for (int32_t b : {spo::kFloat32, spo::kBFloat16, spo::kFloat16})
          check_product({19, 37, 71, 1}, a, b, transposed);
      check_product({260, 520, 40, 0}, spo::kFloat32, spo::kBFloat16, transposed);
      for (int64_t columns : {1, 15, 33, 300})
        for (int64_t depth : {1, 31, 600})
          check_product({29, columns, depth, depth % 2}, spo::kBFloat16, spo::kBFloat16,
                        transposed);
      for (int64_t empty : {0, 1, 2})
        check_product({empty == 0 ? 0 : 3, empty == 1 ? 0 : 3, empty == 2 ? 0 : 3, 0},
                      spo::kFloat32, spo::kFloat32, transposed);
    }
  }
  return spo::check::finish("test_matmul_fixed");
}
