#pragma once
// The soft cap of logits. With k = tanh_scale the sweeps of csrc/cuda/row.cuh work on y = tanh(k x)
// in place of the logit x, at the temperature divided by the cap. Gradients by x are those by y
// times k (1 - y^2).
#include "csrc/cuda/primitives.cuh"
#include "csrc/tanh.h"

namespace spo {

struct CappedLogit {
  float value, slope;  // y and its derivative by x
};

// As csrc/tanh.h says, with the derivative of large u for all; NaN stays NaN. What a caller does
// not use costs nothing.
__device__ __forceinline__ CappedLogit capped_logit(float x, float tanh_scale) {
  const float u = x * tanh_scale, square = u * u;
  float p = fmaf(kTanhP4, square, kTanhP3);
  p = fmaf(p, square, kTanhP2);
  p = fmaf(fmaf(p, square, kTanhP1), square, kTanhP0);
  const float near = fmaf(u * square, p, u);
  const float e = exp2_approx(-fabsf(u) * kTwoLog2E), inverse = reciprocal_approx(1 + e);
  const float rest = (e + e) * inverse, far = copysignf(1 - rest, u);
  const float value = square < kTanhNear * kTanhNear ? near : far;
  return {value, rest * (inverse + inverse) * tanh_scale};
}

// y under a cap, else x.
template <bool kCapped>
__device__ __forceinline__ float swept_logit(float x, float tanh_scale) {
  return kCapped ? capped_logit(x, tanh_scale).value : x;
}

}  // namespace spo
