// The one check that is left to C++: pelt_fast/functional checks shapes, dtypes and devices.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <optional>

namespace pelt_fast {

using OptionalTensor = std::optional<at::Tensor>;

// Memory can be taken from under a tensor (storage.resize_(0), as FSDP frees a parameter): reading
// on would leave the process.
inline void check_memory(const char* name, const at::Tensor& t) {
  const size_t needed = at::detail::computeStorageNbytes(t.sizes(), t.strides(), t.itemsize(),
                                                         size_t(t.storage_offset()));
  const size_t there = t.storage().nbytes();
  TORCH_CHECK_VALUE(needed <= there, name, " of shape ", t.sizes(), " needs ", needed,
                    " bytes of memory; its storage has ", there);
}

inline void check_memory(const char* name, const OptionalTensor& t) {
  if (t) check_memory(name, *t);
}

template <class Tensors>
void check_memory_of_all(const char* name, const Tensors& tensors) {
  for (const auto& t : tensors) check_memory(name, t);
}

} // namespace pelt_fast
