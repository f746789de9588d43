// Which kernels run: the fastest that this machine has, or the ones named by ATTRIBUTION_ISA.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "contract.h"

namespace attribution {

const Kernels* choose_kernels() {
  const char* wanted = std::getenv("ATTRIBUTION_ISA");
  if (wanted == nullptr || *wanted == 0) return kernels_portable();
  if (std::string(wanted) == "portable") return kernels_portable();
  throw std::invalid_argument(std::string("ATTRIBUTION_ISA: wanted one of portable, got ") + wanted);
}

}  // namespace attribution
