// A scale and a bias by element, of an adapter for each row. Schemas:
// pelt_fast/ops/multi_elementwise.py.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

#include "../check.h"

namespace pelt_fast {

// x (T, features), last stride 1; scales and biases (L, features) likewise, in x's dtype or in the
// one that is computed in; bucket, perm and indptr are the plan's. Returns y (T, features).
at::Tensor multi_elementwise_fwd(const at::Tensor& x, const OptionalTensor& scales,
                                 const OptionalTensor& biases, const at::Tensor& bucket);

// dx (T, features), dscales and dbiases (L, features) in the dtype that is computed in, each where
// it is needed.
using MultiElementwiseGradients = std::tuple<OptionalTensor, OptionalTensor, OptionalTensor>;
MultiElementwiseGradients multi_elementwise_bwd(const at::Tensor& dy, const OptionalTensor& x,
                                                const OptionalTensor& scales,
                                                const at::Tensor& perm, const at::Tensor& indptr,
                                                bool need_dx, bool need_dscales, bool need_dbiases);

} // namespace pelt_fast
