#include "csrc/cpu/isa.h"

#include <cstdlib>
#include <stdexcept>

namespace spo {

const char* isa_name(Isa isa) {
  if (isa == Isa::kAvx512) return "avx512";
  return isa == Isa::kAvx2 ? "avx2" : "portable";
}

bool isa_runs_here(Isa isa) {
  if (isa == Isa::kPortable) return true;
#if defined(__x86_64__)
  // libgcc and compiler-rt also check that the operating system saves the wide registers.
  __builtin_cpu_init();
  if (isa == Isa::kAvx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

Isa chosen_isa() {
  const Isa all[] = {Isa::kAvx512, Isa::kAvx2, Isa::kPortable};
  const char* wanted = std::getenv("SPO_CPU_ISA");
  if (wanted && *wanted) {
    for (Isa isa : all) {
      if (std::string(wanted) != isa_name(isa)) continue;
      if (isa_runs_here(isa)) return isa;
      throw std::runtime_error("SPO_CPU_ISA=" + std::string(wanted) +
                               ": this processor does not have those instructions");
    }
    throw std::runtime_error("SPO_CPU_ISA must be avx512, avx2 or portable, found '" +
                             std::string(wanted) + "'");
  }
  for (Isa isa : all)
    if (isa_runs_here(isa)) return isa;
  return Isa::kPortable;
}

bool has_bf16_products() {
#ifdef SPO_AVX512_BF16
  return chosen_isa() == Isa::kAvx512 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

}  // namespace spo
