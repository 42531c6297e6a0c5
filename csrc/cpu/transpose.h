#pragma once
// The transpose of a square of numbers in vector registers.
#include "csrc/cpu/vec.h"

namespace spo {
namespace SPO_ISA {

// Lanes come in pairs of runs of kStep: the second runs of `a` and the first ones of `b` change
// places.
template <int kStep>
static inline void exchange(Vec& a, Vec& b) {
#if defined(SPO_ISA_AVX512)
  const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i step = _mm512_set1_epi32(kStep), of_b = _mm512_set1_epi32(Vec::kLanes);
  const __mmask16 second = _mm512_test_epi32_mask(lanes, step);
  const __m512i first = _mm512_mask_add_epi32(lanes, second, _mm512_sub_epi32(lanes, step), of_b);
  const __m512i last = _mm512_mask_add_epi32(_mm512_add_epi32(lanes, step), second, lanes, of_b);
  const __m512 x = a.v;
  a.v = _mm512_permutex2var_ps(x, first, b.v);
  b.v = _mm512_permutex2var_ps(x, last, b.v);
#elif defined(SPO_ISA_AVX2)
  const __m256 x = a.v, y = b.v;
  if constexpr (kStep == 1) {
    a.v = _mm256_blend_ps(x, _mm256_moveldup_ps(y), 0xaa);
    b.v = _mm256_blend_ps(_mm256_movehdup_ps(x), y, 0xaa);
  } else if constexpr (kStep == 2) {
    a.v = _mm256_shuffle_ps(x, y, 0x44);
    b.v = _mm256_shuffle_ps(x, y, 0xee);
  } else {
    a.v = _mm256_permute2f128_ps(x, y, 0x20);
    b.v = _mm256_permute2f128_ps(x, y, 0x31);
  }
#else
  for (int i = 0; i < Vec::kLanes; ++i) {
    if (i & kStep) continue;
    const float x = a.v[i + kStep];
    a.v[i + kStep] = b.v[i];
    b.v[i] = x;
  }
#endif
}

// Lane j of rows[i] and lane i of rows[j] change places.
template <int kStep = 1>
static inline void transpose(Vec rows[Vec::kLanes]) {
  for (int i = 0; i < Vec::kLanes; ++i)
    if (!(i & kStep)) exchange<kStep>(rows[i], rows[i + kStep]);
  if constexpr (2 * kStep < Vec::kLanes) transpose<2 * kStep>(rows);
}

}  // namespace SPO_ISA
}  // namespace spo
