// Batched bottleneck adapters on a CPU: every row its own adapter. Shapes and dtypes were checked
// by the caller (pelt_fast/ops/multi_bottleneck.py says what each argument is).
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <string>
#include <tuple>
#include <vector>

#include "../check.h"

namespace pelt_fast {

// What both directions take.
struct MultiBottleneck {
  at::Tensor down, up;               // (L, M, d), (L, d, M)
  OptionalTensor down_bias, up_bias; // (L, M), (L, d)
  OptionalTensor scale, gate;        // (L,), (T,)
  OptionalTensor ln_weight, ln_bias; // (d,)
  std::vector<at::Tensor> plan;      // MultiAdapterPlan.arrays
  at::Tensor widths;                 // (L,) int32
  OptionalTensor seed;
  std::string activation;
  double scaling, eps, dropout_p;
  bool residual_x;
};

// x, residual (T, d) -> y (T, d), q (T, M), and mean and 1 / deviation (T, 2) of the layernorm.
std::tuple<at::Tensor, at::Tensor, OptionalTensor> multi_bottleneck_fwd(
    const at::Tensor& x, const OptionalTensor& residual, const MultiBottleneck& call);

// In the order of GRADIENTS in pelt_fast/ops/multi_bottleneck.py.
constexpr size_t kMultiBottleneckGradients = 10;
std::array<OptionalTensor, kMultiBottleneckGradients> multi_bottleneck_bwd(
    const at::Tensor& dy, const at::Tensor& x, const OptionalTensor& residual, const at::Tensor& q,
    const OptionalTensor& stats, const MultiBottleneck& call, const std::vector<bool>& needs);

} // namespace pelt_fast
