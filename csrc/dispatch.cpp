// Which instruction set runs: the most capable one that this machine has, or the one that ATTRIBUTION_ISA names.
#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>

namespace attribution {
namespace {

bool runs(const std::string& name) {
#ifdef ATTRIBUTION_X86
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512f = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                       __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (name == "avx2") return avx2;
  if (name == "avx512f") return avx512f;
  if (name == "avx512_bf16") return avx512f && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
#endif
  return name == "portable";
}

// Best first.
std::vector<const InstructionSet*> compiled() {
#ifdef ATTRIBUTION_X86
  return {instruction_set_avx512_bf16(), instruction_set_avx512f(), instruction_set_avx2(), instruction_set_portable()};
#else
  return {instruction_set_portable()};
#endif
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
