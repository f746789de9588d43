#pragma once
#include <string>
#include <vector>

#include "contract.h"

namespace attribution {

// Best first.
std::vector<std::string> runnable_instruction_sets();

}  // namespace attribution
