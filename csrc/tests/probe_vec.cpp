// What test_vec checks of Vec, compiled once per instruction set. Sizes are multiples of 16.
#include <cstdint>

#include "csrc/cpu/vec.h"

namespace spo {
namespace SPO_ISA {

template <class In, class Out>
static void apply(const In* x, Out* y, int64_t size, bool with_exp2) {
  for (int64_t i = 0; i < size; i += Vec::kLanes) {
    const Vec v = Vec::load(x + i);
    (with_exp2 ? exp2(v) : v).store(y + i);
  }
}

void probe_exp2(const float* x, float* y, int64_t size) { apply(x, y, size, true); }

void probe_tanh(const float* x, float* y, float* slope, int64_t size) {
  for (int64_t i = 0; i < size; i += Vec::kLanes) {
    const Tanh t = tanh(Vec::load(x + i));
    t.value.store(y + i);
    t.slope.store(slope + i);
  }
}

// fp32 to half precision and back; bf16 if `bfloat`, else fp16.
void probe_round(const float* x, uint16_t* half, float* back, int64_t size, bool bfloat) {
  if (bfloat) {
    apply(x, reinterpret_cast<BFloat16*>(half), size, false);
    apply(reinterpret_cast<const BFloat16*>(half), back, size, false);
  } else {
    apply(x, reinterpret_cast<Float16*>(half), size, false);
    apply(reinterpret_cast<const Float16*>(half), back, size, false);
  }
}

// [0] the sum of the lanes, [1] the largest, [2...] max(x, y) of each lane.
void probe_reduce(const float* x, const float* y, float* out) {
  out[0] = static_cast<float>(Vec::load(x).sum());
  out[1] = Vec::load(x).largest();
  max(Vec::load(x), Vec::load(y)).store(out + 2);
}

int probe_lanes() { return Vec::kLanes; }

}  // namespace SPO_ISA
}  // namespace spo
