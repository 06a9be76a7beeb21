// Kernels of one row: layernorm, activations, sums and products of elements; and products of rows
// that lie anywhere. Tables like kernels.h's.
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

  // out = a + b, rounded; b may be null.
  void (*narrow_sum)(int64_t n, const A* a, const A* b, T* out);

  // w = keep · (w + bias) · factor · scale + x + skip, where keep is words >= threshold. All of
  // bias, scale, words, x and skip may be null.
  void (*combine)(int64_t n, const A* bias, A factor, const A* scale, const uint32_t* words,
                  uint32_t threshold, const T* x, const T* skip, A* w);

  // sum += a · b · factor
  void (*add_product)(int64_t n, const A* a, const A* b, A factor, A* sum);
  A (*dot)(int64_t n, const A* a, const A* b);

  // The mean, and the mean square of what is left without it.
  void (*moments)(int64_t n, const A* x, A* mean, A* variance);

  // out = (x - mean) · rstd · weight + bias; bias may be null, wide may be x.
  void (*normalise)(int64_t n, const A* x, A mean, A rstd, const A* weight, const A* bias, T* out);
  void (*normalise_wide)(int64_t n, const A* x, A mean, A rstd, const A* weight, const A* bias,
                         A* out);

  // From a layernorm's input s and dy to its gradient ds, in the place of s; dweight += dy · ŝ and
  // dbias += dy where they are not null.
  void (*normalise_backward)(int64_t n, const A* dy, A mean, A rstd, const A* weight, A* s,
                             A* dweight, A* dbias);

  // n is a multiple of the lanes. out = act(q); da = da · act'(q).
  void (*activate)(Activation kind, int64_t n, const A* q, A* out);
  void (*activate_backward)(Activation kind, int64_t n, const A* q, A* da);

  // Of a softmax whose other terms sum up to exp(log_sum): the scores become probabilities of
  // scale · score, and what the other terms' part is multiplied with is returned. n_padded is a
  // multiple of the lanes; zeros from n on.
  A (*join_softmax)(int64_t n, int64_t n_padded, A scale, A log_sum, A* scores);

  // Products with a matrix whose rows are given by their addresses; all in A, n a multiple of the
  // lanes, sums in the order of Kernels::gemm_wide.
  // c (m, n) = or += rows (m, k) · b (k, n)
  void (*gemm_from)(int64_t m, int64_t n, int64_t k, const A* const* rows, const A* b, int64_t ldb,
                    A* c, int64_t ldc, bool accumulate);
  // rows (m, n) = or += a (m, k) · b (k, n). As many addresses as `ahead` follow those of rows, of
  // what comes next and is asked for meanwhile.
  void (*gemm_into)(int64_t m, int64_t n, int64_t k, const A* a, int64_t lda, const A* b,
                    int64_t ldb, A* const* rows, int64_t ahead, bool accumulate);
  // c (m, n) = or += a (m, k) · rows (k, n)
  void (*gemm_over)(int64_t m, int64_t n, int64_t k, const A* a, int64_t lda, const A* const* rows,
                    A* c, int64_t ldc, bool accumulate);
};

} // namespace pelt_fast
