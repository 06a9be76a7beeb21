// The Compacter adapter: a bottleneck adapter whose projections are sums of Kronecker products, on
// a CPU; the formulas stand in compacter.cpp. Shapes and dtypes were checked by the caller
// (pelt_fast/functional/compacter.py says which).
#pragma once

#include <array>
#include <tuple>
#include <vector>

#include "adapter.h"

namespace pelt_fast {

// Σ_i rule_i ⊗ (left_i right_i): rule (n, n, n), left (n, in / n, k), right (n, k, out / n).
struct Phm {
  at::Tensor rule, left, right;
};

struct CompacterTensors : AdapterVectors {
  Phm down, up; // from d to m features, and back
};

// x, skip (T, d) -> y (T, d), q (T, m), and mean and 1 / deviation (T, 2) of each layernorm.
std::tuple<at::Tensor, at::Tensor, OptionalTensor, OptionalTensor> compacter_fwd(
    const at::Tensor& x, const OptionalTensor& skip, const CompacterTensors& tensors,
    const AdapterSettings& settings);

// In the order of GRADIENTS in pelt_fast/ops/compacter.py.
constexpr size_t kCompacterGradients = 16;
std::array<OptionalTensor, kCompacterGradients> compacter_bwd(
    const at::Tensor& dy, const at::Tensor& x, const OptionalTensor& skip, const at::Tensor& q,
    const OptionalTensor& pre_stats, const OptionalTensor& post_stats,
    const CompacterTensors& tensors, const AdapterSettings& settings,
    const std::vector<bool>& needs);

} // namespace pelt_fast
