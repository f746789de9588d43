// Which instruction set runs: the most capable one that this machine has, or the one that ATTRIBUTION_ISA names.
#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>
#include <utility>

#ifdef ATTRIBUTION_X86
#include <cpuid.h>
#endif
#if defined(ATTRIBUTION_AMX) && !defined(ATTRIBUTION_EMULATED_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace attribution {
namespace {

#ifdef ATTRIBUTION_EMULATED_AMX
bool may_use_matrices() { return true; }
#elif defined(ATTRIBUTION_AMX)
// Linux wants to be asked, once for each process, before a thread may have matrix registers; children inherit the answer.
bool may_use_matrices() {
  static const bool may = [] {
    unsigned eax, ebx, ecx, edx = 0;
    constexpr unsigned bf16 = 1u << 22, tile = 1u << 24, int8 = 1u << 25;
    constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    const bool has = __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & bf16) && (edx & tile) && (edx & int8);
    return has && syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
  }();
  return may;
}
#endif

#ifdef ATTRIBUTION_X86
// AMD's family of Zen 3 and Zen 4. Where machines are virtual, the answer takes microseconds.
bool zen4() {
  unsigned eax = 0, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && ((eax >> 8) & 15) + ((eax >> 20) & 255) == 0x19;
}
#endif

bool runs(const std::string& name) {
#ifdef ATTRIBUTION_X86
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512f = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                       __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (name == "avx2") return avx2;
  if (name == "avx512f") return avx512f;
  const bool avx512_bf16 = avx512f && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") &&
                           __builtin_cpu_supports("avx512vbmi");
  if (name == "avx512_bf16" || name == "avx512_bf16_zen4") return avx512_bf16;
#ifdef ATTRIBUTION_AMX
  if (name == "avx512_amx") return avx512_bf16 && may_use_matrices();
#endif
#endif
  return name == "portable";
}

// Best first.
const std::vector<const InstructionSet*>& compiled() {
  static const std::vector<const InstructionSet*> all = [] {
    std::vector<const InstructionSet*> sets;
#ifdef ATTRIBUTION_AMX
    sets = {instruction_set_avx512_amx()};
#endif
#ifdef ATTRIBUTION_X86
    sets.insert(sets.end(), {instruction_set_avx512_bf16(), instruction_set_avx512_bf16_zen4()});
    if (zen4()) std::swap(sets.end()[-2], sets.end()[-1]);
    sets.insert(sets.end(), {instruction_set_avx512f(), instruction_set_avx2()});
#endif
    sets.push_back(instruction_set_portable());
    return sets;
  }();
  return all;
}

}  // namespace

std::vector<std::string> runnable_instruction_sets() {
  std::vector<std::string> names;
  for (const InstructionSet* set : compiled())
    if (runs(set->name)) names.push_back(set->name);
  return names;
}

const InstructionSet* choose_instruction_set() {
  const char* variable = std::getenv("ATTRIBUTION_ISA");
  const std::string wanted = variable == nullptr ? "" : variable;
  for (const InstructionSet* set : compiled())
    if (runs(set->name) && (wanted.empty() || wanted == set->name)) return set;
  std::string names;
  for (const std::string& name : runnable_instruction_sets()) names += (names.empty() ? "" : ", ") + name;
  throw std::invalid_argument("ATTRIBUTION_ISA: wanted one of " + names + " on this machine, got " + wanted);
}

}  // namespace attribution
