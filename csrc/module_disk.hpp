// The part of the extension module that reads files.
#pragma once

#include <nanobind/nanobind.h>

namespace localmoe {

void bind_disk(nanobind::module_& m);

}  // namespace localmoe
