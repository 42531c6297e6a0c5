#pragma once
// Constants of tanh(u), the soft cap of logits, in fp32.
//
// Near 0 it is u + u^3 P(u^2), so that a cap far above the logits loses no digits of them.
// Elsewhere it is 1 - g of |u| with g = 2 e / (1 + e), e = exp(-2 |u|), and the sign of u. The
// derivative there is 2 g / (1 + e): 1 - tanh(u)^2 cancels where the tanh is near 1.
namespace spo {

constexpr float kTanhNear = 0.65f;
constexpr float kTwoLog2E = 2.88539008177792681f;
// P, minimax: 7e-9 of the tanh. Rounding in fp32 makes that 1.7 ulp, 0.3 in the mean.
constexpr float kTanhP0 = -3.333325918e-1f, kTanhP1 = 1.333081248e-1f, kTanhP2 = -5.368657090e-2f,
                kTanhP3 = 2.046483715e-2f, kTanhP4 = -5.510236871e-3f;

}  // namespace spo
