// What the ordinary calls of LoRA and of batched LoRA share: the frozen product below them.
#pragma once

#include <optional>

#include "reader.h"

namespace pelt_fast {

// A linear with a frozen weight whose packed product pays, of x.
struct FrozenLinear {
  at::Tensor weight;
  OptionalTensor bias;
};
std::optional<FrozenLinear> ordinary_frozen(Reader& reader, pybind11::handle weight,
                                            pybind11::handle bias);

// With a gradient forward and backward are lora_linear's, which packs at each call what it has no
// room for.
bool has_both_packed(const at::Tensor& weight);

} // namespace pelt_fast
