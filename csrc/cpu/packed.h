// Packed copies of frozen weights and adapters, made once and kept while they are true.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <optional>
#include <vector>

namespace pelt_fast {

// A matrix (n, k) as strips of `strip` columns; a strip is k_padded / pair groups of strip × pair
// elements. Columns past n and rows past k are zero.
struct Packed {
  at::Tensor data;
  int64_t n, k, k_padded, strip;

  int64_t strips() const { return (n + strip - 1) / strip; }
  // Strip s from row k0 (a multiple of the pair) on.
  template <class T>
  const T* at(int64_t s, int64_t k0 = 0) const {
    return reinterpret_cast<const T*>(data.const_data_ptr()) + s * strip * k_padded + k0 * strip;
  }
};

// Packs source (n, k), any strides, cast to dtype, k padded to a multiple of k_unit (itself one of
// pair). The pack is kept, and given again only while the source is the same storage at the same
// version with the same contents: by hash, all of a small or trained tensor and a walk through a
// large frozen one, for what the version counter does not see. Of a large inference tensor, which
// has no version, no pack is kept. A freed source takes its packs with it. ours: the source is this
// library's own, which nobody writes to, so that its contents need no look.
std::shared_ptr<const Packed> packed(const at::Tensor& source, at::ScalarType dtype, int64_t strip,
                                     int64_t pair, int64_t k_unit, bool trained = false,
                                     bool ours = false);

// The same, of a source that is not trained; null where it would have to be made and there is no
// room for it beside what is kept.
std::shared_ptr<const Packed> packed_in_room(const at::Tensor& source, at::ScalarType dtype,
                                             int64_t strip, int64_t pair, int64_t k_unit);

// What identifies these tensors and their contents, by the same rules as a pack's source:
// addresses, versions, and hashes (all of a small tensor, a walk through every row and column of a
// large one). Nothing where one of them is a large inference tensor, or is not in the CPU's memory.
std::optional<uint64_t> fingerprint_of(const std::vector<at::Tensor>& tensors);

int64_t packed_bytes();
void clear_packed();
// The most memory that packs may take together; the least recently used go first; 0 keeps none.
void set_packed_limit(int64_t bytes);

} // namespace pelt_fast
