// Batched multi-LoRA on a CPU: every row its own adapter. Shapes and dtypes were checked by the
// caller (pelt_fast/ops/multi_lora.py says what each argument is).
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "../check.h"

namespace pelt_fast {

// What both directions take. One entry of a list for each projection of the same x.
struct MultiLoRA {
  std::vector<at::Tensor> lora_a, lora_b; // (L, R, in), (L, out, R)
  at::Tensor perm, indptr;                // int32: bucket g is rows perm[indptr[g] : indptr[g + 1]]
  std::vector<at::Tensor> ranks, scaling; // (L,) int32, (L,) in the accumulator's type
  OptionalTensor row_scale;               // (T,) in the accumulator's type
  double dropout_p;
  OptionalTensor seed;
};

// The call of the operator's arguments: plan is MultiAdapterPlan.arrays, of which order and
// boundaries of the buckets are read.
MultiLoRA multi_lora_of(const at::Tensor& x, const std::vector<at::Tensor>& lora_a,
                        const std::vector<at::Tensor>& lora_b, const std::vector<at::Tensor>& plan,
                        const std::vector<at::Tensor>& ranks,
                        const std::vector<at::Tensor>& scaling, const OptionalTensor& row_scale,
                        double dropout_p, const OptionalTensor& seed);

struct MultiLoRAOutput {
  std::vector<at::Tensor> y; // (T, out) each
  at::Tensor s;              // (T, ΣR)
};

// inplace: y is base.
MultiLoRAOutput multi_lora_fwd(const at::Tensor& x, const std::vector<OptionalTensor>& base,
                               const MultiLoRA& call, bool inplace);

// The same, one projection, added to x Wᵀ + b.
MultiLoRAOutput multi_lora_linear_fwd(const at::Tensor& x, const at::Tensor& weight,
                                      const OptionalTensor& bias, const MultiLoRA& call);

struct MultiLoRAGradients {
  OptionalTensor dx;                  // (T, in)
  std::vector<OptionalTensor> da, db; // as lora_a, lora_b, one for each; nothing where not needed
  OptionalTensor drow_scale;          // (T,) in the accumulator's type
};

// With a weight, of multi_lora_linear_fwd: dx is that of x Wᵀ too.
MultiLoRAGradients multi_lora_bwd(const std::vector<at::Tensor>& dy, const at::Tensor& x,
                                  const at::Tensor& s, const MultiLoRA& call, bool need_dx,
                                  bool need_da, bool need_db, bool need_drow_scale,
                                  const OptionalTensor& weight = {});

} // namespace pelt_fast
