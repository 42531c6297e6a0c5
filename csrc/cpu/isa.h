#pragma once
// The instruction sets that vectorised kernels are compiled for, and which one runs.
#include <string>

namespace spo {

enum class Isa { kPortable, kAvx2, kAvx512 };

// The best one that this processor has, or the one in the environment variable SPO_CPU_ISA
// (portable, avx2, avx512), read at each call. Throws std::runtime_error if that is unknown or
// cannot run here.
Isa chosen_isa();

const char* isa_name(Isa isa);
bool isa_runs_here(Isa isa);

// Whether AVX512_BF16 was compiled, the chosen instruction set is avx512, and this processor has
// the extension.
bool has_bf16_products();

}  // namespace spo

// SPO_PER_ISA(void, rows, (const Args&, int64_t)) declares rows() in every instruction set's
// namespace and `rows_for(isa)`, which returns a pointer to one of them.
#if defined(__x86_64__) || defined(_M_X64)
#define SPO_PER_ISA(result, name, params)                   \
  namespace portable {                                      \
  result name params;                                       \
  }                                                         \
  namespace avx2 {                                          \
  result name params;                                       \
  }                                                         \
  namespace avx512 {                                        \
  result name params;                                       \
  }                                                         \
  inline auto name##_for(Isa isa)->result(*) params {       \
    if (isa == Isa::kAvx512) return avx512::name;           \
    return isa == Isa::kAvx2 ? avx2::name : portable::name; \
  }
#else
#define SPO_PER_ISA(result, name, params) \
  namespace portable {                    \
  result name params;                     \
  }                                       \
  inline auto name##_for(Isa)->result(*) params { return portable::name; }
#endif
