// Which levels of instructions this machine can really run.
#pragma once

#include <string>
#include <vector>

#include "kernels.hpp"

namespace localmoe {

// Levels that were compiled, lowest first.
std::vector<const Kernels*> compiled_levels();

// Whether the machine computes small products with this level, and rightly; found out once. Flags alone do not
// tell: a hypervisor may announce what the system does not allow, and AMX needs the kernel's permission, asked for
// here.
bool works(const Kernels& kernels);

}  // namespace localmoe
