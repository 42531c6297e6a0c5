#pragma once
// Offsets of packed sequences, such as cu_seqlens.
#include <algorithm>
#include <cstdint>

namespace spo {

// Whether `offsets` (count + 1,) start at 0, end at `total` and never decrease. Check this before
// reading through them: a bad offset points outside the buffers.
inline bool are_offsets(const int64_t* offsets, int64_t count, int64_t total) {
  return offsets[0] == 0 && offsets[count] == total && std::is_sorted(offsets, offsets + count + 1);
}

}  // namespace spo
