// The bottleneck adapter with its layernorms and residuals, on a CPU; the formulas stand in
// adapter.cpp. Shapes and dtypes were checked by the caller (pelt_fast/functional/adapter.py says
// which).
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <string>
#include <tuple>
#include <vector>

#include "../check.h"

namespace pelt_fast {

// What an adapter has besides its projections: scale (1,) or (d,), gate (T,), the rest vectors.
struct AdapterVectors {
  OptionalTensor down_bias, up_bias, scale, gate, pre_weight, pre_bias, ln_weight, ln_bias, seed;
};

// The parameters of one adapter: down (m, d), up (d, m).
struct AdapterTensors : AdapterVectors {
  at::Tensor down, up;
};

struct AdapterSettings {
  std::string activation;
  double scaling, pre_eps, eps, dropout_p;
  bool skip_in, residual_x, residual_skip;
};

// x, skip (T, d) -> y (T, d), q (T, m), and mean and 1 / deviation (T, 2) of each layernorm.
std::tuple<at::Tensor, at::Tensor, OptionalTensor, OptionalTensor> bottleneck_adapter_fwd(
    const at::Tensor& x, const OptionalTensor& skip, const AdapterTensors& tensors,
    const AdapterSettings& settings);

// In the order of GRADIENTS in pelt_fast/ops/adapter.py.
constexpr size_t kAdapterGradients = 12;
std::array<OptionalTensor, kAdapterGradients> bottleneck_adapter_bwd(
    const at::Tensor& dy, const at::Tensor& x, const OptionalTensor& skip, const at::Tensor& q,
    const OptionalTensor& pre_stats, const OptionalTensor& post_stats,
    const AdapterTensors& tensors, const AdapterSettings& settings, const std::vector<bool>& needs);

} // namespace pelt_fast
