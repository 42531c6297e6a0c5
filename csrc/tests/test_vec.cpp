// Vec of every instruction set this host can run: exp2, tanh, half precision, NaN, infinities,
// reductions.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <vector>

#include "csrc/cpu/isa.h"
#include "csrc/tests/check.h"

namespace spo {
SPO_PER_ISA(void, probe_exp2, (const float*, float*, int64_t))
SPO_PER_ISA(void, probe_tanh, (const float*, float*, float*, int64_t))
SPO_PER_ISA(void, probe_round, (const float*, uint16_t*, float*, int64_t, bool))
SPO_PER_ISA(void, probe_reduce, (const float*, const float*, float*))
SPO_PER_ISA(int, probe_lanes, ())
}  // namespace spo

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// Every float from -0 to -144 at a stride of its bit pattern, against the double function.
void test_exp2(spo::Isa isa) {
  std::vector<float> x, y;
  for (uint32_t bits = 0x80000000u; bits < 0xc3100000u; bits += 997) x.push_back(from_bits(bits));
  for (uint32_t payload : {0x7fc00000u, 0xffc00000u, 0x7fffffffu, 0x7f800001u})
    x.push_back(from_bits(payload));
  while (x.size() % 16 != 0) x.push_back(-kInf);
  y.resize(x.size());
  spo::probe_exp2_for(isa)(x.data(), y.data(), static_cast<int64_t>(x.size()));
  double worst = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    const double want = std::exp2(static_cast<double>(x[i]));
    if (x[i] != x[i]) {
      CHECK(y[i] != y[i]);
    } else if (want < 0x1p-126) {
      CHECK_NEAR(y[i], 0, 0x1p-126, "exp2 underflows");
      if (x[i] < -126) CHECK(y[i] == 0);
    } else {
      worst = std::fmax(worst, std::abs(y[i] - want) / want);
    }
  }
  std::fprintf(stderr, "  exp2: worst relative error %.3g\n", worst);
  CHECK(worst < 1.3e-7);
}

// Every float from 2^-120 to 64 at a stride of its bit pattern, both signs, in units in the last
// place of the double function. Infinities give 1 and a slope of 0.
void test_tanh(spo::Isa isa) {
  std::vector<float> x, y, slope;
  for (uint32_t bits = 0x03800000u; bits < 0x42800000u; bits += 991)
    for (uint32_t sign : {0u, 0x80000000u}) x.push_back(from_bits(bits | sign));
  for (float special : {0.0f, -0.0f, kInf, -kInf, 3e38f, -3e38f}) x.push_back(special);
  for (uint32_t payload : {0x7fc00000u, 0xffc00000u, 0x7fffffffu}) x.push_back(from_bits(payload));
  while (x.size() % 16 != 0) x.push_back(0);
  y.resize(x.size()), slope.resize(x.size());
  const auto size = static_cast<int64_t>(x.size());
  spo::probe_tanh_for(isa)(x.data(), y.data(), slope.data(), size);
  double worst = 0, worst_slope = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    const double exact = x[i], want = std::tanh(exact), flat = 1 / std::cosh(exact);
    if (x[i] != x[i]) {
      CHECK(y[i] != y[i] && slope[i] != slope[i]);
      continue;
    }
    CHECK(std::abs(y[i]) <= 1 && (x[i] == 0 || std::signbit(y[i]) == std::signbit(x[i])));
    if (std::abs(x[i]) > 64) {
      CHECK(std::abs(y[i]) == 1 && slope[i] == 0);
    } else {
      const double ulp = std::ldexp(1.0, std::ilogb(want == 0 ? 1 : want) - 23);
      worst = std::fmax(worst, std::abs(y[i] - want) / ulp);
      if (std::abs(exact) < 40)
        worst_slope = std::fmax(worst_slope, std::abs(slope[i] / (flat * flat) - 1));
    }
  }
  std::vector<float> mixed = x, other(x.size()), other_slope(x.size());
  for (size_t i = 0; i < x.size(); i += 3) mixed[i] = 5;  // no result may depend on other lanes
  spo::probe_tanh_for(isa)(mixed.data(), other.data(), other_slope.data(), size);
  for (size_t i = 0; i < x.size(); ++i)
    if (mixed[i] == x[i]) CHECK(other[i] == y[i] && other_slope[i] == slope[i]);
  std::fprintf(stderr, "  tanh: worst error %.3g ulp, of its slope %.3g\n", worst, worst_slope);
  CHECK(worst < 1.8 && worst_slope < 6e-6);
}

// Rounding to nearest even by definition: the candidate is the nearest of its neighbours.
void test_round(spo::Isa isa, bool bfloat) {
  std::vector<float> x;
  for (uint32_t bits = 0; bits < 0xff800000u; bits += 4093) {
    if ((bits & 0x7fffffffu) <= 0x7f800000u) x.push_back(from_bits(bits));
  }
  for (uint32_t half = 0; half < 0x8000; ++half) {  // values exactly between two bf16 neighbours
    if (half < 0x7f80) x.push_back(from_bits(half << 16 | 0x8000));
  }
  for (int mantissa = 0; mantissa < 2048; ++mantissa) {  // and two fp16 neighbours
    x.push_back(std::ldexp(static_cast<float>(mantissa * 2 + 1), -25));
    x.push_back(1 + std::ldexp(static_cast<float>(mantissa * 2 + 1), -11));
  }
  const size_t count = x.size();
  for (uint32_t payload : {0x7fc00000u, 0x7fffffffu, 0xffffffffu, 0x7f800001u})
    x.push_back(from_bits(payload));
  while (x.size() % 16 != 0) x.push_back(0);
  std::vector<uint16_t> half(x.size());
  std::vector<float> back(x.size());
  const auto size = static_cast<int64_t>(x.size());
  spo::probe_round_for(isa)(x.data(), half.data(), back.data(), size, bfloat);
  const double top = bfloat ? std::ldexp(511.0, 119) : 65520;  // from here on it rounds to infinity
  for (size_t i = 0; i < count; ++i) {
    const double exact = x[i], magnitude = std::abs(exact);
    if (magnitude >= top) {
      CHECK(std::isinf(back[i]) && std::signbit(back[i]) == std::signbit(x[i]));
      continue;
    }
    const int digits = bfloat ? 7 : 10, least = bfloat ? -126 : -14;
    const int exponent = magnitude == 0 ? least : std::fmax(std::ilogb(magnitude), least);
    const double unit = std::ldexp(1.0, exponent - digits);
    const double want = std::copysign(std::nearbyint(magnitude / unit) * unit, exact);
    CHECK_NEAR(back[i], want, 0, bfloat ? "bf16 rounding" : "fp16 rounding");
  }
  for (size_t i = count; i < count + 4; ++i) CHECK(back[i] != back[i]);
}

void test_reduce(spo::Isa isa) {
  const int lanes = spo::probe_lanes_for(isa)();
  std::vector<float> x(lanes), y(lanes), out(lanes + 2);
  for (int i = 0; i < lanes; ++i) x[i] = static_cast<float>(i % 3 ? -i : i), y[i] = 2;
  x[1] = std::numeric_limits<float>::quiet_NaN();
  y[2] = std::numeric_limits<float>::quiet_NaN();
  spo::probe_reduce_for(isa)(x.data(), y.data(), out.data());
  CHECK(out[0] != out[0]);
  CHECK(out[2 + 1] == 2);  // the second operand where one is NaN
  CHECK(out[2 + 2] != out[2 + 2]);
  CHECK(out[2 + 3] == 3 && out[2 + 0] == 2);
  x[1] = y[2] = -kInf;
  x[lanes - 1] = 100;
  spo::probe_reduce_for(isa)(x.data(), y.data(), out.data());
  CHECK(out[0] == -kInf && out[1] == 100);
  x[1] = 1;
  float sum = 0;
  for (float value : x) sum += value;
  spo::probe_reduce_for(isa)(x.data(), y.data(), out.data());
  CHECK(out[0] == sum);
}

}  // namespace

int main() {
  for (spo::Isa isa : {spo::Isa::kPortable, spo::Isa::kAvx2, spo::Isa::kAvx512}) {
    if (!spo::isa_runs_here(isa)) {
      std::fprintf(stderr, "%s: not on this processor, skipped\n", spo::isa_name(isa));
      continue;
    }
    std::fprintf(stderr, "%s\n", spo::isa_name(isa));
    test_exp2(isa);
    test_tanh(isa);
    test_round(isa, true);
    test_round(isa, false);
    test_reduce(isa);
  }
  return spo::check::finish("test_vec");
}
