// The inner kernels of one instruction set, as a table of functions.
#pragma once

#include <cstdint>

#include "gates.h"
#include "rows.h"
#include "types.h"

namespace pelt_fast {

// Everything below works on tiles that fit a cache; nothing here allocates, threads or checks.
template <class T>
struct Kernels {
  using A = Acc<T>;
  const char* name;
  int lanes; // A's in a vector: the unit that packed widths are padded to

  // c (m, n) = or += a (m, k) · b. a is row-major with stride lda, k even where kPair is 2 (pad a
  // with zeros). b is packed: k / kPair groups of ldb columns of kPair elements. n is a multiple of
  // lanes, ldb >= n. next: a packed b that will be multiplied after this one and is fetched
  // meanwhile, or null.
  void (*gemm)(int64_t m, int64_t n, int64_t k, const A* a, int64_t lda, const T* b, int64_t ldb,
               A* c, int64_t ldc, bool accumulate, const T* next);

  // The same with b (k, n) already in A, row-major; nothing is fetched.
  void (*gemm_wide)(int64_t m, int64_t n, int64_t k, const A* a, int64_t lda, const A* b,
                    int64_t ldb, A* c, int64_t ldc, bool accumulate);

  // c (m, n) = or += a (m, k) · b (n, k)ᵀ, all in A, row-major, any sizes.
  void (*dots)(int64_t m, int64_t n, int64_t k, const A* a, int64_t lda, const A* b, int64_t ldb,
               A* c, int64_t ldc, bool accumulate);

  // out (columns, rows) = in (rows, columns)ᵀ
  void (*transpose)(int64_t rows, int64_t columns, const A* in, int64_t ld_in, A* out,
                    int64_t ld_out);

  // out[0:n] = x[0:n] in A; then zeros up to n_padded. With words: zero wherever words[i] <
  // threshold.
  void (*widen)(int64_t n, int64_t n_padded, const T* x, const uint32_t* words, uint32_t threshold,
                A* out);

  // out[0:n] = x[0:n], zero wherever words[i] < threshold; then zeros up to n_padded.
  void (*drop)(int64_t n, int64_t n_padded, const T* x, const uint32_t* words, uint32_t threshold,
               T* out);

  // out[2 i] = even[i], out[2 i + 1] = odd[i] for i < n (0 where odd is null): two rows in the
  // paired layout.
  void (*interleave)(int64_t n, const T* even, const T* odd, T* out);

  // y[0:n] = c[0:n] (+ bias[0:n]) rounded to nearest even.
  void (*narrow)(int64_t n, const A* c, const A* bias, T* y);

  // c[0:n] += scale · delta[0:n] wherever words[i] >= threshold.
  void (*add_masked)(int64_t n, const A* delta, A scale, const uint32_t* words, uint32_t threshold,
                     A* c);

  // words[0:n] = the 32 random bits of elements first .. first + n - 1 (pelt_fast/random.py says
  // which).
  void (*philox)(uint64_t seed, uint32_t stream, uint64_t first, int64_t n, uint32_t* words);

  RowKernels<T> rows;
  GateKernels<A> gates;
};

template <class T>
const Kernels<T>& kernels_default();
template <class T>
const Kernels<T>& kernels_avx2();
template <class T>
const Kernels<T>& kernels_avx512();

} // namespace pelt_fast
