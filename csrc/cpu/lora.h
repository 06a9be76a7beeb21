// LoRA linear on a CPU; shapes and dtypes were checked by the caller
// (pelt_fast/backends/cpp/lora.py says which).
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>
#include <vector>

#include "../check.h"

namespace pelt_fast {

// x (T, in) -> y (T, out), s (T, R).
std::tuple<at::Tensor, at::Tensor> lora_linear_fwd(
    const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
    const std::vector<at::Tensor>& lora_a, const std::vector<at::Tensor>& lora_b,
    const std::vector<OptionalTensor>& lora_bias, const std::vector<double>& scaling,
    const std::vector<double>& dropout_p, const OptionalTensor& seed);

// Whether W is packed, or there is room for it beside the other packs; it is packed then.
bool has_packed(const at::Tensor& weight);

// x (T, in) -> x Wᵀ + b (T, out); nothing where W is not packed and there is no room for it.
OptionalTensor frozen_linear(const at::Tensor& x, const at::Tensor& weight,
                             const OptionalTensor& bias);

struct LoRAGradients {
  OptionalTensor dx, dbias;
  std::vector<OptionalTensor> da, db, dlora_bias;
};

// dy (T, out) -> what is needed of dx (T, in), dbias (out,), dA (r, in), dB (out, r), dlora_bias
// (out,).
LoRAGradients lora_linear_bwd(const at::Tensor& dy, const OptionalTensor& x,
                              const at::Tensor& weight, const std::vector<at::Tensor>& lora_a,
                              const std::vector<at::Tensor>& lora_b, const OptionalTensor& s,
                              const std::vector<double>& scaling,
                              const std::vector<double>& dropout_p, const OptionalTensor& seed,
                              bool need_dx, bool need_dbias, const std::vector<bool>& need_da,
                              const std::vector<bool>& need_db,
                              const std::vector<bool>& need_dlora_bias);

} // namespace pelt_fast
