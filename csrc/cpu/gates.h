// Kernels that make a weight out of a frozen one and a gate for each element: diff pruning and
// masking; tables like kernels.h's.
#pragma once

#include <cstdint>

namespace pelt_fast {

// The hard concrete distribution (Louizos et al., 2018): a sigmoid stretched to (lower, lower +
// width) and cut to [0, 1]. ratio = -lower / (lower + width); scale multiplies every gate.
template <class A>
struct HardConcrete {
  A lower, width, ratio, scale;
};

// n elements each. words, 32 random bits an element, are null where gates are without noise.
template <class A>
struct GateKernels {
  // out = weight + scale · gate · diff; returns how many gates are expected to be open.
  A (*diff)(int64_t n, const A* weight, const A* diff, const A* log_alpha, const uint32_t* words,
            HardConcrete<A> gate, A* out);

  // From g = d loss / d out (null: zero) and d loss / d the count of open gates. Of out, ddiff and
  // dlog_alpha those that are not null are written; returns Σ g · gate · diff, scale's gradient.
  A (*diff_backward)(int64_t n, const A* g, A gcount, const A* weight, const A* diff,
                     const A* log_alpha, const uint32_t* words, HardConcrete<A> gate, A* out,
                     A* ddiff, A* dlog_alpha);

  // out = weight where score >= threshold, else 0; from g = d loss / d out, dscores = g · weight,
  // straight through the comparison, and dweight = g where out = weight, else 0. Those that are not
  // null are written, the gradients only if g is not null.
  void (*mask)(int64_t n, const A* g, const A* weight, const A* scores, A threshold, A* out,
               A* dscores, A* dweight);
};

} // namespace pelt_fast
