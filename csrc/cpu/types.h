// Element types as plain bits: the kernels must not pull library headers into code built for a
// higher instruction set.
#pragma once

#include <cstdint>

namespace pelt_fast {

struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

// What products accumulate in.
template <class T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <class T>
using Acc = typename AccOf<T>::type;

// Rows of k that lie interleaved in a packed operand: bf16 comes in pairs (the "VNNI" layout of AMX
// and AVX-512).
template <class T>
constexpr int kPair = 1;
template <>
inline constexpr int kPair<BF16> = 2;

} // namespace pelt_fast
