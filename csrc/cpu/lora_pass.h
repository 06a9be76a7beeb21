// The pass over rows that the LoRA linear is made of.
//
// Forward and dX are one routine, Pass: both multiply rows by a frozen packed matrix, shrink the
// same rows to the rank and expand the rank into the product's accumulator. Forward shrinks with A
// and expands with B, and dropout acts on what is shrunk; backward shrinks dY with B (that is dS)
// and expands with A, and dropout acts on what is expanded. A block of rows is read once: the
// shrink and the reduction over rows (dB = dYᵀ s) use the tile that the product has in cache.
// Reductions over rows go to one partial per chunk of rows, added in order, so results do not
// change between runs with the same number of threads.
#pragma once

#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#include "../check.h"
#include "blocks.h"
#include "engine.h"
#include "memory.h"
#include "packed.h"

namespace pelt_fast {

constexpr int64_t kFewRows = 32;

struct Adapter {
  std::shared_ptr<const Packed> shrink; // (rank, k) in one strip of the padded rank
  std::shared_ptr<const Packed> expand; // (n, padded rank)
  int64_t rank, padded, offset,
      padded_offset; // its columns among all adapters', compact and padded
  double shrink_scale, expand_scale;
  Mask mask; // of the input
};

struct Adapters {
  std::vector<Adapter> each;
  int64_t rank = 0, padded = 0;
  bool any_mask = false;
};

template <class E>
struct Pass {
  using T = typename E::T;
  using A = typename E::A;
  using O = typename E::Operand;

  const E& engine;
  const T* x; // (rows, k)
  int64_t rows, k, stride;
  const Packed* weight; // null: no product, only the shrink and the reductions
  const A* bias = nullptr;
  const Adapters& adapters;
  bool mask_expand = false; // dropout acts on what is expanded, else on what is shrunk
  bool shrinks = true;
  O* shrunk = nullptr; // (rows, padded): scaled, rounded to T
  T* s = nullptr;      // (rows, rank): the same, compact; may be null
  T* y = nullptr;      // (rows, n)
  // which rows of x and y are rows 0, 1, ... of the pass, if not they themselves; then nothing is
  // shrunk or reduced here
  const int32_t* order = nullptr;
  // adds to columns [n0, n0 + n) of rows [begin, begin + m), product and bias: c (m, n), rows ld
  // apart
  std::function<void(int64_t begin, int64_t m, int64_t n0, int64_t n, A* c, int64_t ld)> add;

  // reduction over rows of q = x with p (rows, r) and, as a last row, with ones: dB and the sum of
  // dY
  const Reduction<A>* sums = nullptr;
  const T* p = nullptr;
  int64_t p_rank = 0;

  // p (m, rank) of stride ld -> (r, m), m padded with a zero to an even count; one more row, of
  // ones, where r > rank.
  Tile<O> transposed(int64_t m, int64_t rank, int64_t r, const O* p, int64_t ld) const {
    const int64_t padded = round_up(m, 2);
    O* out = workspace().transposed.template get<O>(r * padded);
    for (int64_t j = 0; j < rank; ++j) {
      for (int64_t i = 0; i < m; ++i) out[j * padded + i] = p[i * ld + j];
      if (padded > m) out[j * padded + m] = O{};
    }
    if (r > rank) {
      const A one_wide = 1;
      T one;
      O operand;
      engine.kernels.narrow(1, &one_wide, nullptr, &one);
      engine.operand(1, &one, &operand);
      std::fill_n(out + rank * padded, m, operand);
      if (padded > m) out[rank * padded + m] = O{};
    }
    return {out, padded};
  }

  // Rows [begin, end), strips [strip0, strip1). first: this call shrinks and reduces too.
  void block(int64_t begin, int64_t end, int64_t strip0, int64_t strip1, bool first,
             int64_t chunk) const {
    Workspace& w = workspace();
    const int64_t m = end - begin, width = engine.strip();
    const int64_t strips_at_once = E::kBlockColumns / width;
    // few rows: W is read once, so read each strip of it from end to end, as memory likes it
    const int64_t block_k = rows <= kFewRows ? k : E::kBlockK;
    A* s_tile = first ? w.shrunk.template get<A>(m * adapters.padded) : nullptr;
    Tile<O> p_columns{};
    if (first && sums) {
      O* rows_of_p = w.delta.template get<O>(m * p_rank);
      engine.operand(m * p_rank, p + begin * p_rank, rows_of_p);
      p_columns = transposed(m, p_rank, sums->r, rows_of_p, p_rank);
    }
    do {
      const int64_t stop = std::min(strip1, strip0 + strips_at_once),
                    columns = (stop - strip0) * width;
      A* c = columns ? w.product.template get<A>(m * columns) : nullptr;
      for (int64_t k0 = 0; k0 < k; k0 += block_k) {
        const int64_t kc = std::min(k - k0, block_k), kp = round_up(kc, kPair<T>);
        const T* from = x + (order ? 0 : begin * stride) + k0;
        const Tile<O> tile = engine.left(m, kc, from, stride, Mask{}, 0, 0, w.left, w.random,
                                         order ? order + begin : nullptr);
        for (int64_t strip = strip0; strip < stop; ++strip) {
          const T* next = strip + 1 < stop   ? weight->at<T>(strip + 1, k0)
                          : k0 + block_k < k ? weight->at<T>(strip0, k0 + block_k)
                                             : weight->at<T>(stop < strip1 ? stop : 0);
          engine.gemm(m, width, kp, tile, weight->at<T>(strip, k0), width,
                      c + (strip - strip0) * width, columns, k0 > 0, next);
        }
        if (!first) continue;
        if (shrinks) {
          for (const Adapter& a : adapters.each) {
            const bool masked = a.mask && !mask_expand;
            const Tile<O> in =
                masked ? engine.left(m, kc, from, stride, a.mask, begin, k0, w.masked, w.random)
                       : tile;
            engine.gemm(m, a.padded, kp, in, a.shrink->at<T>(0, k0), a.padded,
                        s_tile + a.padded_offset, adapters.padded, k0 > 0);
          }
        }
        if (sums) {
          const Tile<O> q =
              E::kLeftIsRight ? tile
                              : engine.right(m, kc, from, stride, Mask{}, 0, 0, w.right, w.random);
          engine.outer(sums->r, kc, m, p_columns.data, p_columns.stride, q, sums->of(chunk) + k0,
                       sums->ld);
        }
      }
      if (first && shrinks) finish_shrink(begin, m, s_tile);
      first = false;
      if (columns) {
        expand(begin, m, strip0, stop, c, columns);
        const int64_t n0 = strip0 * width, n = std::min(columns, weight->n - n0);
        if (add) {
          // the bias first, as in a product of its own: the same bits
          for (int64_t i = 0; bias && i < m; ++i)
            engine.kernels.rows.add_wide(n, bias + n0, c + i * columns);
          add(begin, m, n0, n, c, columns);
        }
        for (int64_t i = 0; i < m; ++i) {
          if (order && i + 2 < m) ask_for(y + order[begin + i + 2] * weight->n + n0, n);
          engine.kernels.narrow(n, c + i * columns, bias && !add ? bias + n0 : nullptr,
                                y + (order ? order[begin + i] : begin + i) * weight->n + n0);
        }
      }
      strip0 = stop;
    } while (strip0 < strip1);
  }

  // sum += (what is expanded, rows [begin, end))ᵀ · rows of `in`, each adapter's with its mask: dA
  // from dS and x, which is read once.
  void reduce_expanded(const at::Tensor& in, int64_t begin, int64_t end, const Reduction<A>& sum,
                       int64_t chunk) const {
    Workspace& w = workspace();
    const int64_t m = end - begin, columns = in.size(1);
    const Tile<O> ds = transposed(m, adapters.padded, adapters.padded,
                                  shrunk + begin * adapters.padded, adapters.padded);
    for (int64_t k0 = 0; k0 < columns; k0 += E::kBlockK) {
      const int64_t kc = std::min(columns - k0, E::kBlockK);
      const T* from = data<T>(in) + begin * in.stride(0) + k0;
      A* to = sum.of(chunk) + k0;
      const auto rows_of = [&](const Mask& mask) {
        return engine.right(m, kc, from, in.stride(0), mask, begin, k0, w.right, w.random);
      };
      if (!adapters.any_mask) {
        engine.outer(adapters.padded, kc, m, ds.data, ds.stride, rows_of(Mask{}), to, sum.ld);
        continue;
      }
      for (const Adapter& a : adapters.each)
        engine.outer(a.padded, kc, m, ds.data + a.padded_offset * ds.stride, ds.stride,
                     rows_of(a.mask), to + a.padded_offset * sum.ld, sum.ld);
    }
  }

 private:
  void finish_shrink(int64_t begin, int64_t m, A* s_tile) const {
    T* row = workspace().random.template get<T>(adapters.padded);
    for (int64_t i = 0; i < m; ++i, s_tile += adapters.padded) {
      for (const Adapter& a : adapters.each)
        for (int64_t j = 0; j < a.padded; ++j) {
          A& value = s_tile[a.padded_offset + j];
          value =
              j < a.rank ? value * A(a.shrink_scale) : A(0); // an infinite x made the padding nan
        }
      engine.kernels.narrow(adapters.padded, s_tile, nullptr, row);
      engine.operand(adapters.padded, row, shrunk + (begin + i) * adapters.padded);
      for (const Adapter& a : adapters.each)
        if (s)
          std::copy_n(row + a.padded_offset, a.rank, s + (begin + i) * adapters.rank + a.offset);
    }
  }

  void expand(int64_t begin, int64_t m, int64_t strip0, int64_t stop, A* c, int64_t columns) const {
    Workspace& w = workspace();
    const int64_t width = engine.strip(), n0 = strip0 * width,
                  n = std::min(columns, weight->n - n0);
    for (const Adapter& a : adapters.each) {
      const bool masked = a.mask && mask_expand;
      A* out = masked ? w.delta.template get<A>(m * columns) : c;
      const Tile<O> in{shrunk + begin * adapters.padded + a.padded_offset, adapters.padded};
      for (int64_t strip = strip0; strip < stop; ++strip)
        engine.gemm(m, width, a.padded, in, a.expand->at<T>(strip), width,
                    out + (strip - strip0) * width, columns, !masked);
      for (int64_t i = 0; masked && i < m; ++i) {
        const uint32_t* words = a.mask.words(engine.kernels, begin + i, n0, n, w.random);
        engine.kernels.add_masked(n, out + i * columns, A(a.expand_scale), words, a.mask.threshold,
                                  c + i * columns);
      }
    }
  }
};

// Runs a pass over all rows; after(chunk, is first block of the chunk, begin, end) follows each
// block.
template <class E, class Start, class After>
void run_pass(const Pass<E>& pass, const Plan& plan, const Start& start, const After& after) {
  const int64_t strips = pass.weight ? pass.weight->strips() : 0, threads = plan.threads;
  // too few rows for all threads: the product is split over columns as well, after the shrink
  const int64_t splits =
      plan.chunks >= threads ? 1 : std::min(strips, (threads + plan.blocks - 1) / plan.blocks);
  plan.run([&](int64_t chunk, bool opens, int64_t begin, int64_t end) {
    if (opens) start(chunk);
    pass.block(begin, end, 0, splits > 1 ? 0 : strips, true, chunk);
    after(chunk, begin, end);
    pass.engine.finish();
  });
  if (splits > 1) {
    at::parallel_for(0, plan.blocks * splits, 1, [&](int64_t from, int64_t to) {
      for (int64_t task = from; task < to; ++task) {
        const int64_t b = task / splits, part = task % splits;
        pass.block(b * plan.block, std::min(plan.rows, (b + 1) * plan.block),
                   strips * part / splits, strips * (part + 1) / splits, false, 0);
      }
      pass.engine.finish();
    });
  }
}

template <class E>
Adapters make_adapters(const E& engine, at::ScalarType dtype, const std::vector<at::Tensor>& lora_a,
                       const std::vector<at::Tensor>& lora_b, bool forward, bool expands,
                       const std::vector<double>& scaling, const std::vector<double>& dropout_p,
                       const OptionalTensor& seed) {
  using T = typename E::T;
  Adapters out;
  for (size_t i = 0; i < lora_a.size(); ++i) {
    Adapter a{};
    a.rank = lora_a[i].size(0);
    a.padded = round_up(a.rank, engine.lanes());
    a.offset = out.rank;
    a.padded_offset = out.padded;
    a.mask = make_mask(dropout_p[i], seed, i, lora_a[i].size(1));
    const double keep = keep_scale(a.mask, dropout_p[i]);
    a.shrink_scale = forward ? scaling[i] * keep : scaling[i];
    a.expand_scale = forward ? 1.0 : keep;
    const bool a_trained = lora_a[i].requires_grad(), b_trained = lora_b[i].requires_grad();
    a.shrink = packed(forward ? lora_a[i] : lora_b[i].t(), dtype, a.padded, kPair<T>, kPair<T>,
                      forward ? a_trained : b_trained);
    if (expands)
      a.expand = packed(forward ? lora_b[i] : lora_a[i].t(), dtype, engine.strip(), kPair<T>,
                        engine.lanes(), forward ? b_trained : a_trained);
    out.rank += a.rank;
    out.padded += a.padded;
    out.any_mask = out.any_mask || a.mask;
    out.each.push_back(std::move(a));
  }
  return out;
}

// b + Σ scalingᵢ · lora_biasᵢ in the accumulator's type, padded to whole strips; undefined when
// there is none.
template <class A>
at::Tensor total_bias(const OptionalTensor& bias, const std::vector<OptionalTensor>& lora_bias,
                      const std::vector<double>& scaling) {
  constexpr at::ScalarType wide = at::CppTypeToScalarType<A>::value;
  at::Tensor sum;
  if (bias) sum = bias->to(wide);
  for (size_t i = 0; i < lora_bias.size(); ++i) {
    if (!lora_bias[i]) continue;
    at::Tensor scaled = lora_bias[i]->to(wide).mul(scaling[i]);
    sum = sum.defined() ? sum.add(scaled) : scaled;
  }
  return sum.defined() ? sum.contiguous() : sum;
}

inline bool any(const std::vector<bool>& flags) {
  return std::find(flags.begin(), flags.end(), true) != flags.end();
}

} // namespace pelt_fast
