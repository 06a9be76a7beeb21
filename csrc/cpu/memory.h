// Large outputs, with memory that the first touch does not make expensive.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace pelt_fast {

// An uninitialised (rows, columns). A large one comes fresh from the system, a page fault for every
// 4 KiB of it; asking for huge pages before the first touch makes that one fault for every 2 MiB.
inline at::Tensor empty_rows(int64_t rows, int64_t columns, const at::TensorOptions& options) {
  at::Tensor out = at::empty({rows, columns}, options);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t(2) << 20;
  if (out.nbytes() >= 2 * kHuge) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(out.mutable_data_ptr()),
                    end = begin + out.nbytes();
    const uintptr_t first = (begin + kHuge - 1) / kHuge * kHuge, last = end / kHuge * kHuge;
    // advice only: where the system refuses, nothing changes
    if (last > first) (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  }
#endif
  return out;
}

} // namespace pelt_fast
