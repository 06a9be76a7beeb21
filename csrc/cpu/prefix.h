// Attention over a prefix and a sequence, on a CPU; the formulas stand in prefix.cpp. Shapes and
// dtypes were checked by the caller (pelt_fast/functional/prefix.py says which).
#pragma once

#include <ATen/core/Tensor.h>

#include "../check.h"

namespace pelt_fast {

// query (B, H, L, D), key and value (B, H, S, D), prefix_key and prefix_value (B, H, P, D), mask of
// the sequence (2 or 4 dimensions, broadcastable to (B, H, L, S), finite) -> (B, L, H, D). None of
// the sizes is 0, features lie side by side.
at::Tensor prefix_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                            const at::Tensor& prefix_key, const at::Tensor& prefix_value,
                            const OptionalTensor& mask, bool is_causal, double scale);

} // namespace pelt_fast
