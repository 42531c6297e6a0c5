#pragma once
// Offsets of packed sequences, such as cu_seqlens.
#include <algorithm>
#include <cstdint>

namespace spo {

// Whether `offsets` (count + 1,) starts at 0, ends at `total` and never decreases. To be asked
// before anything is read through them: a bad one would lead outside the buffers.
inline bool are_offsets(const int64_t* offsets, int64_t count, int64_t total) {
  return offsets[0] == 0 && offsets[count] == total && std::is_sorted(offsets, offsets + count + 1);
}

}  // namespace spo
