// Which instruction sets this machine can run.
#pragma once
#include <string>

#include "kernels.h"

namespace pagoda {

// The kernels of that name, null if this machine cannot run them.
const Kernels* find_kernels(const std::string& isa);

}  // namespace pagoda
