#pragma once
// Emulated CUDA launches that take a workspace: what spo_kernels/workspace.py does.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "csrc/tests/check.h"

namespace spo::check {

// Runs a launcher on a workspace full of NaN and returns the result that it leaves there.
template <class Args>
int64_t run_checked(int64_t (*workspace_of)(const Args&), void (*launcher)(const Args&),
                    Args args) {
  constexpr int64_t kGuard = 256;
  const int64_t bytes = workspace_of(args), held = (bytes + 255) / 256 * 256 + kGuard;
  const std::unique_ptr<void, void (*)(void*)> memory(std::aligned_alloc(256, held), std::free);
  unsigned char* const begin = static_cast<unsigned char*>(memory.get());
  std::memset(begin, 0xff, held);
  args.workspace = begin;
  launcher(args);
  for (int64_t i = bytes; i < held; ++i)
    if (!CHECK(begin[i] == 0xff)) break;
  int64_t result;
  std::memcpy(&result, begin, sizeof result);
  return result;
}

}  // namespace spo::check
