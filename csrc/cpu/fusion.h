// AdapterFusion in the bottleneck space, on a CPU; the formulas stand in fusion.cpp. Shapes and
// dtypes were checked by the caller (pelt_fast/functional/fusion.py says which).
#pragma once

#include <optional>

#include "adapter.h"

namespace pelt_fast {

// down (M, d), score (M + N, features of the query), score_bias (M + N,), value (M + N, d); the
// seed is that of the scores' dropout.
struct FusionTensors : AdapterVectors {
  at::Tensor down, score;
  OptionalTensor score_bias;
  at::Tensor value;
};

struct FusionSettings {
  std::string activation;
  std::vector<int64_t> widths;
  double temperature, pre_eps, eps, dropout_p;
  bool skip_in, residual_x, residual_skip;
  bool ours = false; // nobody but this library has seen the matrices
};

// What forward leaves for backward: q (T, M), k (T, M + N), p (T, N), and mean and 1 / deviation
// (T, 2) of each layernorm.
struct FusionSaved {
  at::Tensor q, k, p;
  OptionalTensor pre_stats, post_stats;
};

// x, skip (T, d), query (T, any) -> y (T, d)
std::pair<at::Tensor, FusionSaved> adapter_fusion_fwd(const at::Tensor& x,
                                                      const OptionalTensor& skip,
                                                      const OptionalTensor& query,
                                                      const FusionTensors& tensors,
                                                      const FusionSettings& settings);

// In the order of GRADIENTS in pelt_fast/ops/fusion.py.
constexpr size_t kFusionGradients = 12;
std::array<OptionalTensor, kFusionGradients> adapter_fusion_bwd(
    const at::Tensor& dy, const FusionSaved& saved, const at::Tensor& x, const OptionalTensor& skip,
    const OptionalTensor& query, const FusionTensors& tensors, const FusionSettings& settings,
    const std::vector<bool>& needs);

} // namespace pelt_fast
