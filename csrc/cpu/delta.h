// Weights made of a frozen one and a gate for each element: diff pruning and masking. Schemas:
// pelt_fast/ops/delta.py.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

#include "../check.h"

namespace pelt_fast {

std::tuple<at::Tensor, at::Tensor> diff_pruning_fwd(const at::Tensor& diff,
                                                    const at::Tensor& log_alpha,
                                                    const at::Tensor& weight,
                                                    const OptionalTensor& scale,
                                                    const OptionalTensor& seed, double lower,
                                                    double upper, at::ScalarType dtype);

// ddiff, dlog_alpha, dscale and the weight once more, each where it is needed
using DiffPruningGradients =
    std::tuple<OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor>;
DiffPruningGradients diff_pruning_bwd(const at::Tensor& diff, const at::Tensor& log_alpha,
                                      const at::Tensor& weight, const OptionalTensor& scale,
                                      const OptionalTensor& seed, const OptionalTensor& dmade,
                                      const OptionalTensor& dcount, double lower, double upper,
                                      bool need_diff, bool need_log_alpha, bool need_scale,
                                      bool need_out, at::ScalarType dtype);

at::Tensor masking_fwd(const at::Tensor& weight, const at::Tensor& scores, double threshold,
                       at::ScalarType dtype);

// dscores, dweight and the weight once more, each where it is needed
using MaskingGradients = std::tuple<OptionalTensor, OptionalTensor, OptionalTensor>;
MaskingGradients masking_bwd(const at::Tensor& weight, const at::Tensor& scores,
                             const OptionalTensor& dmade, double threshold, bool need_scores,
                             bool need_weight, bool need_out, at::ScalarType dtype);

} // namespace pelt_fast
