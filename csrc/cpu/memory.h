// Memory of large outputs, kept when they are freed and given out again.
//
// A large tensor comes fresh from the system and goes back when it is freed: every page of it is
// cleared and mapped at its first touch, which costs more than what is written there. So blocks
// that operators of this library let go are kept for their next outputs.
#pragma once

#include <ATen/core/Tensor.h>

namespace pelt_fast {

// An uninitialised (rows, columns); NaN where torch is asked to fill such memory.
at::Tensor empty_rows(int64_t rows, int64_t columns, const at::TensorOptions& options);

// Bytes that are kept for later and in use by no tensor.
int64_t pooled_bytes();
void clear_pool();
// The most bytes to keep; the longest unused go first; 0 keeps none.
void set_pool_limit(int64_t bytes);

} // namespace pelt_fast
