#pragma once
// Checks of the native tests: no framework, a failed check prints where and why and the program
// returns 1 from `finish()`.
#include <cmath>
#include <cstdio>

namespace spo::check {

inline int failures = 0;

inline bool that(bool ok, const char* what, const char* file, int line) {
  if (!ok && ++failures <= 20) std::fprintf(stderr, "%s:%d: %s\n", file, line, what);
  return ok;
}

inline void near(double found, double want, double bound, const char* what, const char* file,
                 int line) {
  if (std::abs(found - want) <= bound || (std::isnan(found) && std::isnan(want))) return;
  if (++failures <= 20)
    std::fprintf(stderr, "%s:%d: %s: expected %.9g within %.3g, found %.9g\n", file, line, what,
                 want, bound, found);
}

inline int finish(const char* name) {
  std::fprintf(stderr, "%s: %d failed checks\n", name, failures);
  return failures ? 1 : 0;
}

}  // namespace spo::check

#define CHECK(condition) spo::check::that(condition, #condition, __FILE__, __LINE__)
#define CHECK_NEAR(found, want, bound, what) \
  spo::check::near(found, want, bound, what, __FILE__, __LINE__)
