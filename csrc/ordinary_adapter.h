// What the ordinary calls of adapters and of batched adapters share.
#pragma once

#include <torch/csrc/utils/pybind.h>

#include "reader.h"

namespace pelt_fast {

// At most one more tensor of x's size, and where it and x are added: `terms` of
// functional/adapter_checks.py.
struct Terms {
  OptionalTensor other;
  pybind11::handle given; // the same in Python
  bool skip_in, residual_x = false, residual_skip = false;

  Terms(Reader& reader, pybind11::handle x, pybind11::handle residual, pybind11::handle skip);
};

// (..., 1), broadcastable, to (T,).
OptionalTensor gate_of(Reader& reader, pybind11::handle h);

} // namespace pelt_fast
