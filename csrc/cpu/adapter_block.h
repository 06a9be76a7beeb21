// What goes around the two projections of an adapter, forward and backward: sums, layernorms, the
// activation, factors, dropout. adapter.cpp has dense projections, compacter.cpp PHM's.
#pragma once

#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>

#include "adapter.h"
#include "blocks.h"
#include "engine.h"
#include "memory.h"

namespace pelt_fast {
namespace {

inline Activation activation_of(const std::string& name) {
  constexpr const char* kNames[] = {"relu",  "gelu",    "gelu_tanh",  "silu",
                                    "tanh",  "sigmoid", "leaky_relu", "quick_gelu",
                                    "relu2", "relu6",   "mish",       "linear"};
  for (size_t i = 0; i < std::size(kNames); ++i)
    if (name == kNames[i]) return static_cast<Activation>(i);
  TORCH_CHECK_VALUE(false, "activation '", name, "' has no C++ kernel");
}

inline void check_memory_of(const AdapterVectors& t) {
  check_memory("down_bias", t.down_bias);
  check_memory("up_bias", t.up_bias);
  check_memory("scaling", t.scale);
  check_memory("gate", t.gate);
  check_memory("pre_ln_weight", t.pre_weight);
  check_memory("pre_ln_bias", t.pre_bias);
  check_memory("ln_weight", t.ln_weight);
  check_memory("ln_bias", t.ln_bias);
}

// A vector parameter in the accumulator's type.
template <class A>
struct Vector {
  at::Tensor tensor;

  Vector() = default;
  explicit Vector(const OptionalTensor& source) {
    if (source) tensor = source->to(at::CppTypeToScalarType<A>::value).contiguous();
  }
  const A* get() const { return tensor.defined() ? data<A>(tensor) : nullptr; }
};

template <class T>
struct Rows {
  const T* data;
  int64_t stride;
  const T* operator[](int64_t i) const { return data + i * stride; }
  explicit operator bool() const { return data != nullptr; }
};

template <class T>
Rows<T> rows_of(const OptionalTensor& t) {
  return t ? Rows<T>{data<T>(*t), t->stride(0)} : Rows<T>{nullptr, 0};
}

// What both directions have in common.
template <class E>
struct Block {
  using T = typename E::T;
  using A = typename E::A;
  using O = typename E::Operand;

  const E& engine;
  const AdapterSettings& settings;
  const int64_t rows, d, m;
  const int64_t ld;       // of a tile of whole rows; its columns past d are zero
  const int64_t m_padded; // of a tile of the bottleneck
  const Activation activation;
  const Rows<T> x, skip;
  const Vector<A> down_bias, up_bias, scale, gate, pre_weight, pre_bias, ln_weight, ln_bias;
  const Mask mask;
  const A scale_of_one;         // scale, when it is one number
  const A factor;               // scaling, and 1 / (1 - p)
  const A* const scale_of_each; // scale, when there is one for each feature

  Block(const E& engine, const at::Tensor& x, const OptionalTensor& skip, int64_t m,
        const AdapterVectors& tensors, const AdapterSettings& settings)
      : engine(engine),
        settings(settings),
        rows(x.size(0)),
        d(x.size(1)),
        m(m),
        ld(round_up(d, 2 * engine.lanes()) + 16), // rows must not fall into the same cache sets
        m_padded(round_up(m, engine.lanes())),
        activation(activation_of(settings.activation)),
        x{data<T>(x), x.stride(0)},
        skip(rows_of<T>(skip)),
        down_bias(tensors.down_bias),
        up_bias(tensors.up_bias),
        scale(tensors.scale),
        gate(tensors.gate),
        pre_weight(tensors.pre_weight),
        pre_bias(tensors.pre_bias),
        ln_weight(tensors.ln_weight),
        ln_bias(tensors.ln_bias),
        mask(make_mask(settings.dropout_p, tensors.seed, 0, d)),
        scale_of_one(tensors.scale && tensors.scale->numel() == 1 ? *scale.get() : A(1)),
        factor(A(settings.scaling * keep_scale(mask, settings.dropout_p))),
        scale_of_each(tensors.scale && tensors.scale->numel() > 1 ? scale.get() : nullptr) {}

  const RowKernels<T>& row() const { return engine.kernels.rows; }

  // Rows that tiles of whole rows are made for.
  int64_t most_rows() const {
    const int64_t fit = E::kTileBytes / (ld * int64_t(sizeof(A))) / E::kRowUnit * E::kRowUnit;
    return std::clamp<int64_t>(fit, E::kRowUnit, E::kBlockRows);
  }
  Plan plan() const { return Plan(rows, 2 * rows * d * m, most_rows(), E::kRowUnit); }

  // z of row i
  void input_sum(int64_t i, A* z) const {
    engine.kernels.widen(d, ld, x[i], nullptr, 0, z);
    if (settings.skip_in) row().add(d, skip[i], z);
  }

  // Can x be multiplied as it is?
  bool plain() const { return std::is_same_v<T, A> && !settings.skip_in && !pre_weight.get(); }

  // The adapter's input, rows [begin, end). stats (T, 2): made when they are not there yet, which
  // forward says.
  Tile<A> inputs(int64_t begin, int64_t end, A* stats, bool forward, Scratch& scratch) const {
    A* tile = scratch.get<A>((end - begin) * ld);
    for (int64_t i = begin; i < end; ++i) {
      A* v = tile + (i - begin) * ld;
      input_sum(i, v);
      if (!pre_weight.get()) continue;
      A* stat = stats + 2 * i;
      if (forward) statistics(v, settings.pre_eps, stat);
      row().normalise_wide(d, v, stat[0], stat[1], pre_weight.get(), pre_bias.get(), v);
    }
    return {tile, ld};
  }

  // The same in forward, as what a product takes; where it is nothing but x, x is taken as it is.
  Tile<O> left_inputs(int64_t begin, int64_t end, A* stats, Workspace& w) const {
    if (!settings.skip_in && !pre_weight.get()) {
      if constexpr (std::is_same_v<T, O>) {
        // brgemm need not take an odd count, nor rows that overlap
        if (kPair<T> == 1 || (d % 2 == 0 && x.stride >= d)) return {x[begin], x.stride};
      }
    }
    return engine.left_of(end - begin, d, inputs(begin, end, stats, true, w.left), w.masked);
  }

  void statistics(const A* values, double eps, A* stat) const {
    A variance;
    row().moments(d, values, stat, &variance);
    stat[1] = A(1) / std::sqrt(variance + A(eps));
  }

  // From the rounded q of a row to q and act(q), wide.
  void activate(const T* rounded, A* q, A* a) const {
    engine.kernels.widen(m, m_padded, rounded, nullptr, 0, q);
    row().activate(activation, m_padded, q, a);
  }

  // keep words of a row; null without dropout
  const uint32_t* words(int64_t i, Scratch& scratch) const {
    return mask ? mask.words(engine.kernels, i, 0, d, scratch) : nullptr;
  }

  // w of row i, without b_U, becomes s.
  void finish(int64_t i, const uint32_t* words, A* w) const {
    row().combine(d, up_bias.get(), weight_of(i), scale_of_each, words, mask.threshold,
                  settings.residual_x ? x[i] : nullptr, settings.residual_skip ? skip[i] : nullptr,
                  w);
  }

  // The rest of rows [begin, end): from w without b_U, rows of s, to y and the statistics.
  void finish_rows(int64_t begin, int64_t end, A* s, A* post, T* y, Scratch& random) const {
    for (int64_t i = begin; i < end; ++i) {
      A* row_of_s = s + (i - begin) * ld;
      finish(i, words(i, random), row_of_s);
      if (!post) {
        engine.kernels.narrow(d, row_of_s, nullptr, y + i * d);
        continue;
      }
      statistics(row_of_s, settings.eps, post + 2 * i);
      row().normalise(d, row_of_s, post[2 * i], post[2 * i + 1], ln_weight.get(), ln_bias.get(),
                      y + i * d);
    }
  }

  A weight_of(int64_t i) const {
    return factor * scale_of_one * (gate.get() ? gate.get()[i] : A(1));
  }
};

// Which gradients are wanted; in the order of GRADIENTS in pelt_fast/ops/adapter.py.
struct Needs {
  bool x, skip, down, down_bias, up, up_bias, scale, gate, pre_weight, pre_bias, ln_weight, ln_bias;

  explicit Needs(const std::vector<bool>& n)
      : x(n[0]),
        skip(n[1]),
        down(n[2]),
        down_bias(n[3]),
        up(n[4]),
        up_bias(n[5]),
        scale(n[6]),
        gate(n[7]),
        pre_weight(n[8]),
        pre_bias(n[9]),
        ln_weight(n[10]),
        ln_bias(n[11]) {}

  bool w() const { return scale || gate; }
  bool dz() const { return x || skip || pre_weight || pre_bias; }
  bool dq() const { return dz() || down || down_bias; }
  bool vectors() const {
    return up_bias || scale || gate || pre_weight || pre_bias || ln_weight || ln_bias;
  }
};

// Sums over rows that are vectors; each has a row of one Reduction.
enum Sums { kUpBias, kScale, kPreWeight, kPreBias, kLnWeight, kLnBias, kSums };

// The gradients of what is around the projections.
template <class E>
struct BackwardAround {
  using T = typename E::T;
  using A = typename E::A;

  static constexpr int64_t kRun = 12; // rows in the shortest sums

  const Block<E>& block;
  const Needs need;
  // hooks on what autograd saves may give it back in another layout
  const at::Tensor q_rows, pre_rows, post_rows;
  const Rows<T> dy, q;
  const A *const pre, *const post;
  Reduction<double> vectors, down_biases; // over all rows: they are short, and may be exact
  T *dx = nullptr, *dskip = nullptr;
  A* dgate = nullptr;
  OptionalTensor of_x, of_skip, of_gate;

  BackwardAround(const Block<E>& block, const Needs& need, const at::Tensor& dy,
                 const at::Tensor& q, const OptionalTensor& pre_stats,
                 const OptionalTensor& post_stats, int64_t chunks)
      : block(block),
        need(need),
        q_rows(q.contiguous()),
        pre_rows(pre_stats ? pre_stats->contiguous() : at::Tensor()),
        post_rows(post_stats ? post_stats->contiguous() : at::Tensor()),
        dy{data<T>(dy), dy.stride(0)},
        q{data<T>(q_rows), block.m},
        pre(pre_rows.defined() ? data<A>(pre_rows) : nullptr),
        post(post_rows.defined() ? data<A>(post_rows) : nullptr) {
    if (need.down_bias) down_biases = Reduction<double>(chunks, 1, block.m);
    if (need.vectors()) vectors = Reduction<double>(chunks, kSums, block.d);
    const auto rows_like = [&](OptionalTensor& gradient) {
      gradient = empty_rows(block.rows, block.d, dy.options());
      return static_cast<T*>(gradient->mutable_data_ptr());
    };
    if (need.x) dx = rows_like(of_x);
    if (need.skip) dskip = rows_like(of_skip);
    if (!need.gate) return;
    of_gate = at::empty({block.rows}, at::CppTypeToScalarType<A>::value);
    dgate = static_cast<A*>(of_gate->mutable_data_ptr());
  }

  // Is dw something else than ds?
  bool scales() const {
    return block.mask || block.gate.get() || block.scale_of_each ||
           block.factor * block.scale_of_one != A(1);
  }

  void start(int64_t chunk) const {
    for (const Reduction<double>* sum : {&vectors, &down_biases})
      if (sum->r) sum->start(chunk);
  }

  // da of `count` rows, in the tile dq, becomes dq; sum: memory for m numbers.
  void through_activation(int64_t chunk, int64_t count, const A* wide_q, A* dq, A* sum) const {
    const int64_t mp = block.m_padded;
    std::fill_n(sum, mp, A(0));
    for (int64_t i = 0; i < count; ++i) {
      block.row().activate_backward(block.activation, mp, wide_q + i * mp, dq + i * mp);
      if (!need.down_bias) continue;
      block.row().add_wide(block.m, dq + i * mp, sum);
      if (i % kRun == kRun - 1 || i == count - 1) move(block.m, sum, down_biases.of(chunk));
    }
  }

  // ds holds w of row i, without b_U; it becomes the gradient of s, and dw that of w.
  void through_output(int64_t i, A* ds, A* dw, A* sums, A* row_of_dy, A* row_of_w) const {
    const RowKernels<T>& row = block.row();
    const int64_t d = block.d, ld = block.ld;
    const uint32_t* words = block.words(i, workspace().random);
    if (need.w()) {
      std::copy_n(ds, ld, row_of_w);
      row.combine(d, block.up_bias.get(), A(1), nullptr, words, block.mask.threshold, nullptr,
                  nullptr, row_of_w);
    }
    if (post) {
      block.finish(i, words, ds);
      block.engine.kernels.widen(d, ld, dy[i], nullptr, 0, row_of_dy);
      row.normalise_backward(d, row_of_dy, post[2 * i], post[2 * i + 1], block.ln_weight.get(), ds,
                             need.ln_weight ? sums + kLnWeight * ld : nullptr,
                             need.ln_bias ? sums + kLnBias * ld : nullptr);
    } else {
      block.engine.kernels.widen(d, ld, dy[i], nullptr, 0, ds);
    }
    std::fill(ds + d, ds + ld, A(0));
    const A gate = block.gate.get() ? block.gate.get()[i] : A(1);
    if (need.scale) row.add_product(d, ds, row_of_w, block.factor * gate, sums + kScale * ld);
    if (need.gate) {
      row.combine(d, nullptr, block.factor * block.scale_of_one, block.scale_of_each, nullptr, 0,
                  nullptr, nullptr, row_of_w);
      dgate[i] = row.dot(d, ds, row_of_w);
    }
    if (dw != ds) {
      std::copy_n(ds, ld, dw);
      row.combine(d, nullptr, block.weight_of(i), block.scale_of_each, words, block.mask.threshold,
                  nullptr, nullptr, dw);
    }
    if (need.up_bias) row.add_wide(d, dw, sums + kUpBias * ld);
    if (dskip && !block.settings.skip_in) // nothing but the residual
      block.engine.kernels.narrow(d, ds, nullptr, dskip + i * d);
  }

  // dv of row i becomes dz, and with ds the gradients of x and skip.
  void through_input(int64_t i, const A* ds, A* dz, A* sums, A* z) const {
    const RowKernels<T>& row = block.row();
    const int64_t d = block.d, ld = block.ld;
    if (pre) {
      block.input_sum(i, z);
      row.normalise_backward(d, dz, pre[2 * i], pre[2 * i + 1], block.pre_weight.get(), z,
                             need.pre_weight ? sums + kPreWeight * ld : nullptr,
                             need.pre_bias ? sums + kPreBias * ld : nullptr);
      dz = z;
    }
    const AdapterSettings& settings = block.settings;
    if (dx) row.narrow_sum(d, dz, settings.residual_x ? ds : nullptr, dx + i * d);
    if (dskip && settings.skip_in)
      row.narrow_sum(d, dz, settings.residual_skip ? ds : nullptr, dskip + i * d);
  }

  bool wanted(int64_t sum) const {
    const bool wanted[kSums] = {need.up_bias,  need.scale,     need.pre_weight,
                                need.pre_bias, need.ln_weight, need.ln_bias};
    return wanted[sum];
  }

  // Moves the sums of a few rows to those of the chunk.
  void settle(int64_t chunk, A* sums) const {
    for (int64_t k = 0; k < kSums; ++k)
      if (wanted(k)) move(block.d, sums + k * block.ld, vectors.of(chunk) + k * vectors.ld);
  }

  static void move(int64_t n, A* few, double* sum) {
    for (int64_t i = 0; i < n; ++i) sum[i] += double(few[i]);
    std::fill_n(few, n, A(0));
  }

  // The gradients into their places among the results: those of the vectors from up's bias on.
  void collect(const AdapterVectors& like, OptionalTensor* out, size_t at_down_bias,
               size_t at_up_bias) const {
    const int64_t d = block.d, m = block.m;
    out[0] = of_x;
    out[1] = of_skip;
    if (need.down_bias)
      out[at_down_bias] = gradient(down_biases.total(), down_biases.ld, 0, 1, m, 1.0, false,
                                   like.down_bias->scalar_type())
                              .reshape({m});
    if (!vectors.r) return;
    const double* sums = vectors.total();
    OptionalTensor* to = out + at_up_bias;
    const auto vector = [&](Sums which, const OptionalTensor& owner) {
      return gradient(sums, vectors.ld, which, 1, d, 1.0, false, owner->scalar_type()).reshape({d});
    };
    if (need.up_bias) to[0] = vector(kUpBias, like.up_bias);
    if (need.scale) {
      const bool one = like.scale->numel() == 1 && d > 1;
      to[1] = one ? gradient(sums, vectors.ld, kScale, 1, d, 1.0, false, at::kDouble)
                        .sum()
                        .reshape({1})
                        .to(like.scale->scalar_type())
                  : vector(kScale, like.scale);
    }
    if (need.gate) to[2] = of_gate->to(like.gate->scalar_type());
    if (need.pre_weight) to[3] = vector(kPreWeight, like.pre_weight);
    if (need.pre_bias) to[4] = vector(kPreBias, like.pre_bias);
    if (need.ln_weight) to[5] = vector(kLnWeight, like.ln_weight);
    if (need.ln_bias) to[6] = vector(kLnBias, like.ln_bias);
  }
};

} // namespace
} // namespace pelt_fast
