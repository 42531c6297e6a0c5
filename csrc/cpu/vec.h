#pragma once
// A float vector of the instruction set this file is compiled for (see CMakeLists.txt): `Vec` with
// loads and stores of fp32, bf16 and fp16, arithmetic, exp2 and tanh. Kernels written against it
// are compiled once per instruction set, into the namespace SPO_ISA.
//
// Nothing here or in a kernel may have a name shared between two instruction sets (no std::
// template, no inline function outside SPO_ISA): the linker keeps one copy, perhaps the one this
// CPU lacks.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "csrc/tanh.h"

#if defined(SPO_ISA_AVX2) || defined(SPO_ISA_AVX512)
#include <immintrin.h>
#endif

namespace spo {
namespace SPO_ISA {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

static inline float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

static inline uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

static inline float to_float(float x) { return x; }
static inline float to_float(BFloat16 x) { return bits_to_float(uint32_t{x.bits} << 16); }
static inline float to_float(Float16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // Placed 112 binades too low, then scaled up: exact, and subnormals come out right.
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * 0x1p112f));
}

// Conversions round to nearest, ties to even, as PyTorch does; NaN stays NaN.
static inline void from_float(float x, float* out) { *out = x; }
static inline void from_float(float x, BFloat16* out) {
  const uint32_t bits = float_to_bits(x);
  out->bits = x != x ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
static inline void from_float(float x, Float16* out) {
  const uint32_t bits = float_to_bits(x), sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00;
  } else if (magnitude >= 0x477ff000u) {  // rounds to 65536 or more
    half = 0x7c00;
  } else if (magnitude >= 0x38800000u) {
    half = (magnitude - 0x38000000u + 0xfff + (magnitude >> 13 & 1)) >> 13;
  } else {  // subnormal: adding 0.5 leaves the rounded mantissa in the low bits
    half = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  }
  out->bits = static_cast<uint16_t>(sign | half);
}

// 2^x = 2^n * 2^r with n = round(x), r = x - n exactly; 2^r by its minimax polynomial of degree 6
// on |r| <= 1/2, of which the constant is 1. For x <= 1 the result is within 2 ulp of 2^x, and
// results below 2^-126 are 0. NaN stays NaN.
constexpr float kExpLow = -126;  // 2 to it is the smallest normal number
constexpr float kExpPoly[] = {1.5594677825e-4f, 1.3406643411e-3f, 9.6176927909e-3f,
                              5.5503103882e-2f, 2.4022652209e-1f, 6.9314724207e-1f};

#if defined(SPO_ISA_AVX512)

struct Vec {
  static constexpr int kLanes = 16;
  __m512 v;

  static Vec fill(float x) { return {_mm512_set1_ps(x)}; }
  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vec load(const BFloat16* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
  }
  static Vec load(const Float16* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(BFloat16* p) const {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
  }
  void store(Float16* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }

  friend Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
  friend Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
  friend Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
  friend Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
  friend Vec operator&(Vec a, Vec b) { return {_mm512_and_ps(a.v, b.v)}; }
  friend Vec operator|(Vec a, Vec b) { return {_mm512_or_ps(a.v, b.v)}; }
  // The larger; `b` if either is NaN.
  friend Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
  // `yes` where a < b, else `no`; `no` if either is NaN.
  friend Vec select_less(Vec a, Vec b, Vec yes, Vec no) {
    return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), no.v, yes.v)};
  }
  // Whether a < b in every lane; false if either is NaN in one.
  friend bool all_less(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ) == 0xffff; }
  friend Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  friend Vec exp2(Vec x) {
    const __mmask16 tiny = _mm512_cmp_ps_mask(x.v, _mm512_set1_ps(kExpLow), _CMP_LT_OQ);
    const __m512 n = _mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 r = _mm512_sub_ps(x.v, n);
    __m512 y = _mm512_set1_ps(kExpPoly[0]);
    for (int i = 1; i < 6; ++i) y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(kExpPoly[i]));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1));
    return {_mm512_maskz_scalef_ps(static_cast<__mmask16>(~tiny), y, n)};
  }
  double sum() const { return _mm512_reduce_add_ps(v); }
  float largest() const { return _mm512_reduce_max_ps(v); }
};

#elif defined(SPO_ISA_AVX2)

struct Vec {
  static constexpr int kLanes = 8;
  __m256 v;

  static Vec fill(float x) { return {_mm256_set1_ps(x)}; }
  static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Vec load(const BFloat16* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
  }
  static Vec load(const Float16* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store(BFloat16* p) const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan);
    rounded = _mm256_srli_epi32(rounded, 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }
  void store(Float16* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }

  friend Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
  friend Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
  friend Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
  friend Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
  friend Vec operator&(Vec a, Vec b) { return {_mm256_and_ps(a.v, b.v)}; }
  friend Vec operator|(Vec a, Vec b) { return {_mm256_or_ps(a.v, b.v)}; }
  // The larger; `b` if either is NaN.
  friend Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
  // `yes` where a < b, else `no`; `no` if either is NaN.
  friend Vec select_less(Vec a, Vec b, Vec yes, Vec no) {
    return {_mm256_blendv_ps(no.v, yes.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))};
  }
  // Whether a < b in every lane; false if either is NaN in one.
  friend bool all_less(Vec a, Vec b) {
    return _mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)) == 0xff;
  }
  friend Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  friend Vec exp2(Vec x) {
    const __m256 tiny = _mm256_cmp_ps(x.v, _mm256_set1_ps(kExpLow), _CMP_LT_OQ);
    const __m256 n = _mm256_round_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m256 r = _mm256_sub_ps(x.v, n);
    __m256 y = _mm256_set1_ps(kExpPoly[0]);
    for (int i = 1; i < 6; ++i) y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(kExpPoly[i]));
    y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(1));
    // 2^n enters the exponent field directly; where that wraps around, `tiny` holds.
    const __m256i shift = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
    y = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(y), shift));
    return {_mm256_andnot_ps(tiny, y)};
  }
  double sum() const {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(half) + _mm_cvtss_f32(_mm_shuffle_ps(half, half, 1));
  }
  float largest() const {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_shuffle_ps(half, half, 1)));
  }
};

#else

struct Vec {
  static constexpr int kLanes = 8;
  float v[kLanes];

  template <class F>
  static Vec map(F f) {
    Vec out;
    for (int i = 0; i < kLanes; ++i) out.v[i] = f(i);
    return out;
  }
  static Vec fill(float x) {
    return map([&](int) { return x; });
  }
  template <class T>
  static Vec load(const T* p) {
    return map([&](int i) { return to_float(p[i]); });
  }
  template <class T>
  void store(T* p) const {
    for (int i = 0; i < kLanes; ++i) from_float(v[i], p + i);
  }

  friend Vec operator+(Vec a, Vec b) {
    return map([&](int i) { return a.v[i] + b.v[i]; });
  }
  friend Vec operator-(Vec a, Vec b) {
    return map([&](int i) { return a.v[i] - b.v[i]; });
  }
  friend Vec operator*(Vec a, Vec b) {
    return map([&](int i) { return a.v[i] * b.v[i]; });
  }
  friend Vec operator/(Vec a, Vec b) {
    return map([&](int i) { return a.v[i] / b.v[i]; });
  }
  friend Vec operator&(Vec a, Vec b) {
    return map([&](int i) { return bits_to_float(float_to_bits(a.v[i]) & float_to_bits(b.v[i])); });
  }
  friend Vec operator|(Vec a, Vec b) {
    return map([&](int i) { return bits_to_float(float_to_bits(a.v[i]) | float_to_bits(b.v[i])); });
  }
  // The larger; `b` if either is NaN.
  friend Vec max(Vec a, Vec b) {
    return map([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
  }
  // `yes` where a < b, else `no`; `no` if either is NaN.
  friend Vec select_less(Vec a, Vec b, Vec yes, Vec no) {
    return map([&](int i) { return a.v[i] < b.v[i] ? yes.v[i] : no.v[i]; });
  }
  // Whether a < b in every lane; false if either is NaN in one.
  friend bool all_less(Vec a, Vec b) {
    bool all = true;
    for (int i = 0; i < kLanes; ++i) all = all && a.v[i] < b.v[i];
    return all;
  }
  friend Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
  friend Vec exp2(Vec x) {
    return map([&](int i) {
      // Adding 1.5 * 2^23 rounds to an integer, which is then the low bits of the sum. The clamp
      // keeps the integer in range, -inf included.
      const float clamped = x.v[i] < kExpLow ? kExpLow : x.v[i];
      const float shifted = clamped + 12582912.0f;
      const float r = clamped - (shifted - 12582912.0f);
      float y = kExpPoly[0];
      for (int j = 1; j < 6; ++j) y = y * r + kExpPoly[j];
      y = y * r + 1;
      y = bits_to_float(float_to_bits(y) + (float_to_bits(shifted) << 23));
      return x.v[i] >= kExpLow ? y : x.v[i] != x.v[i] ? x.v[i] : 0.0f;
    });
  }
  double sum() const { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }
  float largest() const {
    float m = v[0];
    for (int i = 1; i < kLanes; ++i) m = v[i] > m ? v[i] : m;
    return m;
  }
};

#endif

struct Tanh {
  Vec value, slope;  // the slope is 0 at infinities; NaN stays NaN in both
};

// tanh and its derivative, as csrc/tanh.h says. What a caller does not use costs nothing. Most
// logits lie far below their cap, so vectors without a large u are worth a branch; no result
// depends on it.
static inline Tanh tanh(Vec u) {
  const Vec square = u * u, one = Vec::fill(1), sign = Vec::fill(-0.0f);
  const Vec bound = Vec::fill(kTanhNear * kTanhNear);
  Vec p = fma(Vec::fill(kTanhP4), square, Vec::fill(kTanhP3));
  p = fma(p, square, Vec::fill(kTanhP2));
  p = fma(fma(p, square, Vec::fill(kTanhP1)), square, Vec::fill(kTanhP0));
  const Vec near = fma(u * square, p, u), near_slope = one - near * near;
  if (all_less(square, bound)) return {near, near_slope};
  const Vec e = exp2((u | sign) * Vec::fill(kTwoLog2E)), inverse = one / (one + e);
  const Vec rest = (e + e) * inverse, far = (one - rest) | (u & sign);
  return {select_less(square, bound, near, far),
          select_less(square, bound, near_slope, rest * (inverse + inverse))};
}

}  // namespace SPO_ISA
}  // namespace spo
