// Matrices of parameters as operands of products, and sums over rows that become their gradients.
#pragma once

#include "blocks.h"
#include "engine.h"
#include "packed.h"

namespace pelt_fast {
namespace {

// A matrix (n, k), packed for products with rows of k; strips of at most the engine's width.
struct Matrix {
  std::shared_ptr<const Packed> pack;
  int64_t columns; // n, padded to the lanes

  template <class E>
  Matrix(const E& engine, const at::Tensor& source, bool trained, bool ours = false)
      : columns(round_up(source.size(0), engine.lanes())) {
    using T = typename E::T;
    const int64_t width = std::min(engine.strip(), columns);
    pack = packed(source, dtype_of<T>(), width, kPair<T>, engine.lanes(), trained, ours);
  }

  // c (m, columns) = or += a (m, k) · this
  template <class E>
  void product(const E& engine, int64_t m, Tile<typename E::Operand> a, typename E::A* c,
               int64_t ldc, bool accumulate = false) const {
    using T = typename E::T;
    const int64_t k = round_up(pack->k, kPair<T>);
    for (int64_t s = 0, n0 = 0; n0 < columns; ++s, n0 += pack->strip)
      engine.gemm(m, std::min(pack->strip, columns - n0), k, a, pack->at<T>(s), pack->strip, c + n0,
                  ldc, accumulate);
  }

 private:
  template <class T>
  static at::ScalarType dtype_of() {
    if constexpr (std::is_same_v<T, float>) return at::kFloat;
    if constexpr (std::is_same_v<T, double>) return at::kDouble;
    if constexpr (std::is_same_v<T, BF16>) return at::kBFloat16;
    return at::kHalf;
  }
};

// p (m, n) of stride ld -> (n, m), m padded with a zero to an even count.
template <class E>
Tile<typename E::Operand> transposed(const E& engine, int64_t m, int64_t n, Tile<typename E::A> p,
                                     Scratch& scratch) {
  using O = typename E::Operand;
  const int64_t padded = round_up(m, 2);
  O* out = scratch.get<O>(n * padded + n);
  O* row = out + n * padded;
  for (int64_t i = 0; i < m; ++i) {
    engine.operand_of(n, p.data + i * p.stride, row);
    for (int64_t j = 0; j < n; ++j) out[j * padded + i] = row[j];
  }
  if (padded > m)
    for (int64_t j = 0; j < n; ++j) out[j * padded + m] = O{};
  return {out, padded};
}

// sum (r, n) += p (count, r)ᵀ · rows (count, n), the rows as a right operand
template <class E>
void add_outer(const E& engine, const Reduction<typename E::A>& sum, int64_t chunk, int64_t count,
               Tile<typename E::A> p, Tile<typename E::Operand> rows) {
  const auto left = transposed(engine, count, sum.r, p, workspace().transposed);
  engine.outer(sum.r, sum.n, count, left.data, left.stride, rows, sum.of(chunk), sum.ld);
}

} // namespace
} // namespace pelt_fast
