// LoRA linear with UniPELT's gate: y = x Wᵀ + b + g · s Bᵀ, s = scaling · drop(x) Aᵀ, where
// g = Σ_t weight_t · sigmoid(x_t w + b_w) over the tokens of a sample.
//
// The gate of a sample needs all of its tokens, so each direction is two passes: one that shrinks,
// for which w is one more row of A, and one that multiplies by W with what the gate made of it. The
// gate acts on (T, r): nothing of the size of x or y is made for it, and its share of dx rides on
// the expand, where w is again one more row of A.
#include "gated_lora.h"

#include "lora_pass.h"

namespace pelt_fast {
namespace {

template <class A>
A sigmoid(A v) {
  return A(1) / (A(1) + std::exp(-v));
}

// The gate's part of a call: logits to gates, gradients of gates to those of logits.
template <class A>
struct Gate {
  const int64_t samples, tokens; // each
  at::Tensor bias, weights;      // wide; may be undefined

  Gate(const GatedLoRA& adapter, int64_t samples, int64_t rows)
      : samples(samples), tokens(rows / samples) {
    constexpr at::ScalarType wide = at::CppTypeToScalarType<A>::value;
    if (adapter.gate_bias) bias = adapter.gate_bias->to(wide);
    if (adapter.token_weight) weights = adapter.token_weight->to(wide).contiguous();
  }

  A weight(int64_t row) const {
    return weights.defined() ? data<A>(weights)[row] : A(1) / A(tokens);
  }
  A open(A logit) const { return sigmoid(logit + (bias.defined() ? *data<A>(bias) : A(0))); }
};

// Row i of the compact s, wide.
template <class E>
void wide_row(const E& engine, const typename E::T* s, int64_t i, int64_t columns,
              typename E::A* row) {
  engine.kernels.widen(columns, columns, s + i * columns, nullptr, 0, row);
}

} // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> gated_lora_linear_fwd(const at::Tensor& x,
                                                                     const at::Tensor& weight,
                                                                     const OptionalTensor& bias,
                                                                     const GatedLoRA& adapter,
                                                                     int64_t samples) {
  check_memory("x", x);
  check_memory("weight", weight);
  check_memory("bias", bias);
  check_memory("lora_a", adapter.a);
  check_memory("lora_b", adapter.b);
  check_memory("gate_weight", adapter.gate_weight);
  check_memory("gate_bias", adapter.gate_bias);
  check_memory("token_weight", adapter.token_weight);
  at::Tensor y, s, gates;
  with_engine(x.scalar_type(), [&](const auto& engine) {
    using E = std::decay_t<decltype(engine)>;
    using T = typename E::T;
    using A = typename E::A;
    using O = typename E::Operand;
    const int64_t rows = x.size(0), rank = adapter.a.size(0), columns = rank + 1;
    const at::ScalarType dtype = x.scalar_type();
    const Gate<A> gate(adapter, samples, rows);

    const Adapters both = make_adapters(
        engine, dtype, {adapter.a, adapter.gate_weight}, {adapter.b, adapter.gate_weight.t()}, true,
        false, {adapter.scaling, 1.0}, {adapter.dropout_p, 0.0}, adapter.seed);
    s = at::empty({rows, columns}, x.options());
    const at::Tensor shrunk = at::empty({rows * both.padded * int64_t(sizeof(O))}, at::kByte);
    Pass<E> shrink{engine, data<T>(x), rows, x.size(1), x.stride(0), nullptr, nullptr, both};
    shrink.shrunk = static_cast<O*>(shrunk.mutable_data_ptr());
    shrink.s = static_cast<T*>(s.mutable_data_ptr());
    run_pass(
        shrink, Plan(rows, rows * x.size(1) * columns, E::kBlockRows, E::kRowUnit), [](int64_t) {},
        [](int64_t, int64_t, int64_t) {});

    const Adapters one = make_adapters(engine, dtype, {adapter.a}, {adapter.b}, true, true,
                                       {adapter.scaling}, {adapter.dropout_p}, adapter.seed);
    gates = at::empty({samples}, at::CppTypeToScalarType<A>::value);
    const at::Tensor gated = at::empty({rows * one.padded * int64_t(sizeof(O))}, at::kByte);
    A* const g = static_cast<A*>(gates.mutable_data_ptr());
    O* const operands = static_cast<O*>(gated.mutable_data_ptr());
    at::parallel_for(0, samples, 1 + 4096 / (gate.tokens * columns), [&](int64_t from, int64_t to) {
      A* const wide = workspace().delta.template get<A>(one.padded + columns);
      T* const narrow = workspace().random.template get<T>(one.padded);
      for (int64_t sample = from; sample < to; ++sample) {
        const int64_t begin = sample * gate.tokens, end = begin + gate.tokens;
        A sum = 0;
        for (int64_t i = begin; i < end; ++i) {
          wide_row(engine, shrink.s, i, columns, wide);
          if (gate.weight(i) != A(0)) sum += gate.weight(i) * gate.open(wide[rank]);
        }
        g[sample] = sum;
        for (int64_t i = begin; i < end; ++i) {
          wide_row(engine, shrink.s, i, columns, wide);
          for (int64_t j = 0; j < one.padded; ++j) wide[j] = j < rank ? wide[j] * sum : A(0);
          engine.kernels.narrow(one.padded, wide, nullptr, narrow);
          engine.operand(one.padded, narrow, operands + i * one.padded);
        }
      }
    });

    const auto pack = packed(weight, dtype, engine.strip(), kPair<T>, kPair<T>);
    const at::Tensor biases = total_bias<A>(bias, {}, {});
    y = empty_rows(rows, weight.size(0), x.options());
    Pass<E> product{engine, data<T>(x), rows, x.size(1), x.stride(0), pack.get(), nullptr, one};
    if (biases.defined()) product.bias = data<A>(biases);
    product.shrinks = false;
    product.shrunk = operands;
    product.y = static_cast<T*>(y.mutable_data_ptr());
    run_pass(
        product, Plan(rows, rows * weight.numel(), E::kBlockRows, E::kRowUnit), [](int64_t) {},
        [](int64_t, int64_t, int64_t) {});
  });
  return {y, s, gates};
}

std::array<OptionalTensor, 6> gated_lora_linear_bwd(const at::Tensor& dy, const OptionalTensor& x,
                                                    const at::Tensor& weight,
                                                    const GatedLoRA& adapter, const at::Tensor& s,
                                                    const at::Tensor& gate_values,
                                                    const std::vector<bool>& needs) {
  check_memory("dy", dy);
  check_memory("x", x);
  check_memory("weight", weight);
  check_memory("lora_a", adapter.a);
  check_memory("lora_b", adapter.b);
  check_memory("gate_weight", adapter.gate_weight);
  check_memory("gate_bias", adapter.gate_bias);
  check_memory("token_weight", adapter.token_weight);
  check_memory("s", s);
  check_memory("gate", gate_values);
  std::array<OptionalTensor, 6> out;
  const bool need_dx = needs[0], need_dbias = needs[1], need_da = needs[2], need_db = needs[3],
             need_dgate_weight = needs[4], need_dgate_bias = needs[5];
  with_engine(dy.scalar_type(), [&](const auto& engine) {
    using E = std::decay_t<decltype(engine)>;
    using T = typename E::T;
    using A = typename E::A;
    using O = typename E::Operand;
    const at::ScalarType dtype = dy.scalar_type();
    const int64_t rows = dy.size(0), in_features = weight.size(1), out_features = weight.size(0),
                  rank = adapter.a.size(0), columns = rank + 1;
    const Gate<A> gate(adapter, gate_values.numel(), rows);
    const at::Tensor s_rows = s.contiguous(),
                     g = gate_values.to(at::CppTypeToScalarType<A>::value).contiguous();
    const T* const s_data = data<T>(s_rows);
    const A* const gates = data<A>(g);

    // u = dY B, and on the tiles of dY: dB = dYᵀ (g s), sum of dY
    const Adapters one = make_adapters(engine, dtype, {adapter.a}, {adapter.b}, false, false, {1.0},
                                       {0.0}, OptionalTensor());
    const Plan plan(rows, rows * out_features * columns, E::kBlockRows, E::kRowUnit);
    const at::Tensor u_rows = at::empty({rows, rank}, dy.options());
    const at::Tensor shrunk = at::empty({rows * one.padded * int64_t(sizeof(O))}, at::kByte);
    Pass<E> shrink{engine, data<T>(dy), rows, out_features, dy.stride(0), nullptr, nullptr, one};
    shrink.shrunk = static_cast<O*>(shrunk.mutable_data_ptr());
    shrink.s = static_cast<T*>(u_rows.mutable_data_ptr());
    Reduction<A> over_dy;
    at::Tensor gated;
    if (need_db || need_dbias) {
      if (need_db) {
        gated = at::empty({rows, rank}, dy.options());
        T* const to = static_cast<T*>(gated.mutable_data_ptr());
        A* const wide = workspace().delta.template get<A>(columns);
        for (int64_t i = 0; i < rows; ++i) {
          wide_row(engine, s_data, i, columns, wide);
          for (int64_t j = 0; j < rank; ++j) wide[j] *= gates[i / gate.tokens];
          engine.kernels.narrow(rank, wide, nullptr, to + i * rank);
        }
        shrink.p = to;
        shrink.p_rank = rank;
      }
      over_dy = Reduction<A>(plan.chunks, shrink.p_rank + (need_dbias ? 1 : 0), out_features);
      shrink.sums = &over_dy;
    }
    run_pass(
        shrink, plan,
        [&](int64_t chunk) {
          if (over_dy.r) over_dy.start(chunk);
        },
        [](int64_t, int64_t, int64_t) {});

    // the gradients of s and of the logits, side by side, as what is expanded
    const bool need_ds = need_dx || need_da || need_dgate_weight || need_dgate_bias;
    Adapters both;
    at::Tensor ds_rows;
    std::vector<double> dlogits(size_t(gate.samples), 0.0); // their sums over a sample
    if (need_ds) {
      both = make_adapters(engine, dtype, {adapter.a, adapter.gate_weight},
                           {adapter.b, adapter.gate_weight.t()}, false, need_dx, {1.0, 1.0},
                           {adapter.dropout_p, 0.0}, adapter.seed);
      ds_rows = at::empty({rows * both.padded * int64_t(sizeof(O))}, at::kByte);
      O* const ds = static_cast<O*>(ds_rows.mutable_data_ptr());
      const int64_t logit_at = both.each[1].padded_offset;
      at::parallel_for(
          0, gate.samples, 1 + 4096 / (gate.tokens * columns), [&](int64_t from, int64_t to) {
            A* const wide = workspace().delta.template get<A>(both.padded + 2 * columns);
            A *const s_row = wide + both.padded, *const u_row = s_row + columns;
            T* const narrow = workspace().random.template get<T>(both.padded);
            for (int64_t sample = from; sample < to; ++sample) {
              const int64_t begin = sample * gate.tokens, end = begin + gate.tokens;
              double dgate = 0, sum = 0;
              for (int64_t i = begin; i < end; ++i) {
                wide_row(engine, s_data, i, columns, s_row);
                wide_row(engine, shrink.s, i, rank, u_row);
                A dot = 0;
                for (int64_t j = 0; j < rank; ++j) dot += u_row[j] * s_row[j];
                dgate += double(dot);
              }
              for (int64_t i = begin; i < end; ++i) {
                wide_row(engine, s_data, i, columns, s_row);
                wide_row(engine, shrink.s, i, rank, u_row);
                std::fill_n(wide, both.padded, A(0));
                const A factor = A(adapter.scaling) * gates[sample];
                for (int64_t j = 0; j < rank; ++j) wide[j] = factor * u_row[j];
                if (gate.weight(i) != A(0)) {
                  const A open = gate.open(s_row[rank]);
                  wide[logit_at] = A(dgate) * gate.weight(i) * open * (A(1) - open);
                  sum += double(wide[logit_at]);
                }
                engine.kernels.narrow(both.padded, wide, nullptr, narrow);
                engine.operand(both.padded, narrow, ds + i * both.padded);
              }
              dlogits[size_t(sample)] = sum;
            }
          });
    }

    std::shared_ptr<const Packed> pack;
    if (need_dx) pack = packed(weight.t(), dtype, engine.strip(), kPair<T>, kPair<T>);
    Pass<E> product{engine,       data<T>(dy), rows,    out_features,
                    dy.stride(0), pack.get(),  nullptr, both};
    product.mask_expand = true;
    product.shrinks = false;
    if (need_ds) product.shrunk = static_cast<O*>(ds_rows.mutable_data_ptr());
    if (need_dx) {
      out[0] = empty_rows(rows, in_features, dy.options());
      product.y = static_cast<T*>(out[0]->mutable_data_ptr());
    }
    Reduction<A> over_x;
    const Plan wide_plan(rows, rows * weight.numel(), E::kBlockRows, E::kRowUnit);
    if (need_da || need_dgate_weight)
      over_x = Reduction<A>(wide_plan.chunks, both.padded, in_features);
    const auto reduce_x = [&](int64_t chunk, int64_t begin, int64_t end) {
      if (over_x.r) product.reduce_expanded(*x, begin, end, over_x, chunk);
    };
    if (need_dx || over_x.r)
      run_pass(
          product, wide_plan,
          [&](int64_t chunk) {
            if (over_x.r) over_x.start(chunk);
          },
          reduce_x);

    const A* dy_total = over_dy.r ? over_dy.total() : nullptr;
    const A* x_total = over_x.r ? over_x.total() : nullptr;
    if (need_dbias)
      out[1] = gradient(dy_total, over_dy.ld, over_dy.r - 1, 1, out_features, 1.0, false, dtype)
                   .reshape({out_features});
    if (need_da)
      out[2] = gradient(x_total, over_x.ld, 0, rank, in_features, both.each[0].expand_scale, false,
                        adapter.a.scalar_type());
    if (need_db)
      out[3] =
          gradient(dy_total, over_dy.ld, 0, rank, out_features, 1.0, true, adapter.b.scalar_type());
    if (need_dgate_weight)
      out[4] = gradient(x_total, over_x.ld, both.each[1].padded_offset, 1, in_features, 1.0, false,
                        adapter.gate_weight.scalar_type());
    if (need_dgate_bias) {
      double sum = 0;
      for (double d : dlogits) sum += d;
      out[5] = at::full({1}, sum, at::TensorOptions().dtype(adapter.gate_bias->scalar_type()));
    }
  });
  return out;
}

} // namespace pelt_fast
