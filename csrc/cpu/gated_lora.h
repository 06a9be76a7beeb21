// LoRA linear with UniPELT's gate on a CPU; shapes and dtypes were checked by the caller
// (pelt_fast/functional/gated_lora.py says which).
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <tuple>
#include <vector>

#include "../check.h"

namespace pelt_fast {

// a (r, in), b (out, r), gate_weight (1, in), gate_bias (1,), token_weight (samples, tokens each):
// the weights of the mean over the tokens of a sample, all alike where there are none.
struct GatedLoRA {
  at::Tensor a, b, gate_weight;
  OptionalTensor gate_bias, token_weight;
  double scaling, dropout_p;
  OptionalTensor seed;
};

// x (T, in), the rows of `samples` samples -> y (T, out); s (T, r + 1), scaled drop(x) Aᵀ and the
// gate's logits without their bias; gate (samples,).
std::tuple<at::Tensor, at::Tensor, at::Tensor> gated_lora_linear_fwd(const at::Tensor& x,
                                                                     const at::Tensor& weight,
                                                                     const OptionalTensor& bias,
                                                                     const GatedLoRA& adapter,
                                                                     int64_t samples);

// dy (T, out) -> what is needed of dx, dbias, da, db, dgate_weight, dgate_bias.
std::array<OptionalTensor, 6> gated_lora_linear_bwd(const at::Tensor& dy, const OptionalTensor& x,
                                                    const at::Tensor& weight,
                                                    const GatedLoRA& adapter, const at::Tensor& s,
                                                    const at::Tensor& gate,
                                                    const std::vector<bool>& needs);

} // namespace pelt_fast
