// Tensors of any number of dimensions as rows, and back: pelt_fast/ops/rows.py, for callers that
// come without the operator.
#pragma once

#include <ATen/Functions.h>

#include <vector>

namespace pelt_fast {

// (..., features) -> (T, features), last stride 1.
inline at::Tensor to_rows(const at::Tensor& x) {
  if (x.layout() != at::kStrided) return to_rows(x.to_dense());
  const at::Tensor rows = x.dim() == 2 ? x : x.reshape({-1, x.size(-1)});
  return rows.stride(1) == 1 || rows.size(1) == 1 ? rows : rows.contiguous();
}

// Fresh (T, features) in the shape of `like`, but for its last size. Not a view to autograd.
inline at::Tensor from_rows(const at::Tensor& rows, const at::Tensor& like) {
  if (like.dim() == 2) return rows;
  std::vector<int64_t> shape(like.sizes().begin(), like.sizes().end());
  shape.back() = rows.size(1);
  return at::_unsafe_view(rows, shape);
}

} // namespace pelt_fast
