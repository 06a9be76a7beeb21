// Kernels of one row: layernorm, activations, sums and products of elements; tables like
// kernels.h's.
#pragma once

#include <cstdint>

#include "types.h"

namespace pelt_fast {

// In the order of ACTIVATIONS in pelt_fast/activations.py.
enum class Activation {
  kRelu,
  kGelu,
  kGeluTanh,
  kSilu,
  kTanh,
  kSigmoid,
  kLeakyRelu,
  kQuickGelu,
  kRelu2,
  kRelu6,
  kMish,
  kLinear,
};

// n elements each; A is the accumulator's type. What may be null says so.
template <class T>
struct RowKernels {
  using A = Acc<T>;

  // sum += x
  void (*add)(int64_t n, const T* x, A* sum);
  void (*add_wide)(int64_t n, const A* x, A* sum);

  // w = (w + bias) · factor · scale; bias and scale may be null.
  void (*affine)(int64_t n, const A* bias, A factor, const A* scale, A* w);

  // x = 0 wherever words < threshold.
  void (*mask)(int64_t n, const uint32_t* words, uint32_t threshold, A* x);

  // sum += a · b · factor
  void (*add_product)(int64_t n, const A* a, const A* b, A factor, A* sum);
  A (*dot)(int64_t n, const A* a, const A* b);

  // The mean, and the mean square of what is left without it.
  void (*moments)(int64_t n, const A* x, A* mean, A* variance);

  // out = (x - mean) · rstd · weight + bias; bias may be null. out may be x.
  void (*normalise)(int64_t n, const A* x, A mean, A rstd, const A* weight, const A* bias, A* out);

  // From a layernorm's input s and dy to its gradient ds, in the place of s; dweight += dy · ŝ and
  // dbias += dy where they are not null.
  void (*normalise_backward)(int64_t n, const A* dy, A mean, A rstd, const A* weight, A* s,
                             A* dweight, A* dbias);

  // n is a multiple of the lanes. out = act(q); da = da · act'(q).
  void (*activate)(Activation kind, int64_t n, const A* q, A* out);
  void (*activate_backward)(Activation kind, int64_t n, const A* q, A* da);
};

} // namespace pelt_fast
