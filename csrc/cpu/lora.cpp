// LoRA linear: y = x Wᵀ + b + Σ sᵢ Bᵢᵀ, sᵢ = scalingᵢ · dropᵢ(x) Aᵢᵀ, and its gradients.
//
// A pass over rows forward, a pass over rows backward: lora_pass.h.
#include "lora.h"

#include "lora_pass.h"

namespace pelt_fast {

std::tuple<at::Tensor, at::Tensor> lora_linear_fwd(
    const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
    const std::vector<at::Tensor>& lora_a, const std::vector<at::Tensor>& lora_b,
    const std::vector<OptionalTensor>& lora_bias, const std::vector<double>& scaling,
    const std::vector<double>& dropout_p, const OptionalTensor& seed) {
  check_memory("x", x);
  check_memory("weight", weight);
  check_memory("bias", bias);
  check_memory_of_all("lora_a", lora_a);
  check_memory_of_all("lora_b", lora_b);
  check_memory_of_all("lora_bias", lora_bias);
  at::Tensor y, s;
  with_engine(x.scalar_type(), [&](const auto& engine) {
    using E = std::decay_t<decltype(engine)>;
    using T = typename E::T;
    const auto pack = packed(weight, x.scalar_type(), engine.strip(), kPair<T>, kPair<T>);
    const Adapters adapters = make_adapters(engine, x.scalar_type(), lora_a, lora_b, true, true,
                                            scaling, dropout_p, seed);
    const at::Tensor biases = total_bias<typename E::A>(bias, lora_bias, scaling);
    y = empty_rows(x.size(0), weight.size(0), x.options());
    s = at::empty({x.size(0), adapters.rank}, x.options());
    const Plan plan(x.size(0), x.size(0) * weight.numel(), E::kBlockRows, E::kRowUnit);
    const at::Tensor shrunk =
        at::empty({x.size(0) * adapters.padded * int64_t(sizeof(typename E::Operand))}, at::kByte);
    Pass<E> pass{engine,      data<T>(x), x.size(0), x.size(1),
                 x.stride(0), pack.get(), nullptr,   adapters};
    if (biases.defined()) pass.bias = data<typename E::A>(biases);
    pass.shrunk = static_cast<typename E::Operand*>(shrunk.mutable_data_ptr());
    pass.s = static_cast<T*>(s.mutable_data_ptr());
    pass.y = static_cast<T*>(y.mutable_data_ptr());
    run_pass(pass, plan, [](int64_t) {}, [](int64_t, int64_t, int64_t) {});
  });
  return {y, s};
}

bool has_packed(const at::Tensor& weight) {
  bool found = false;
  with_engine(weight.scalar_type(), [&](const auto& engine) {
    using T = typename std::decay_t<decltype(engine)>::T;
    found = bool(packed_in_room(weight, weight.scalar_type(), engine.strip(), kPair<T>, kPair<T>));
  });
  return found;
}

OptionalTensor frozen_linear(const at::Tensor& x, const at::Tensor& weight,
                             const OptionalTensor& bias) {
  OptionalTensor y;
  with_engine(x.scalar_type(), [&](const auto& engine) {
    using E = std::decay_t<decltype(engine)>;
    using T = typename E::T;
    const auto pack = packed_in_room(weight, x.scalar_type(), engine.strip(), kPair<T>, kPair<T>);
    if (!pack) return;
    const Adapters none;
    const at::Tensor biases = total_bias<typename E::A>(bias, {}, {});
    y = empty_rows(x.size(0), weight.size(0), x.options());
    const Plan plan(x.size(0), x.size(0) * weight.numel(), E::kBlockRows, E::kRowUnit);
    Pass<E> pass{engine, data<T>(x), x.size(0), x.size(1), x.stride(0), pack.get(), nullptr, none};
    if (biases.defined()) pass.bias = data<typename E::A>(biases);
    pass.shrinks = false;
    pass.y = static_cast<T*>(y->mutable_data_ptr());
    run_pass(pass, plan, [](int64_t) {}, [](int64_t, int64_t, int64_t) {});
  });
  return y;
}

LoRAGradients lora_linear_bwd(const at::Tensor& dy, const OptionalTensor& x,
                              const at::Tensor& weight, const std::vector<at::Tensor>& lora_a,
                              const std::vector<at::Tensor>& lora_b, const OptionalTensor& s,
                              const std::vector<double>& scaling,
                              const std::vector<double>& dropout_p, const OptionalTensor& seed,
                              bool need_dx, bool need_dbias, const std::vector<bool>& need_da,
                              const std::vector<bool>& need_db,
                              const std::vector<bool>& need_dlora_bias) {
  check_memory("dy", dy);
  check_memory("x", x);
  check_memory("weight", weight);
  check_memory_of_all("lora_a", lora_a);
  check_memory_of_all("lora_b", lora_b);
  check_memory("s", s);
  LoRAGradients out;
  const size_t n = lora_a.size();
  out.da.resize(n);
  out.db.resize(n);
  out.dlora_bias.resize(n);
  with_engine(dy.scalar_type(), [&](const auto& engine) {
    using E = std::decay_t<decltype(engine)>;
    using T = typename E::T;
    using A = typename E::A;
    using O = typename E::Operand;
    const at::ScalarType dtype = dy.scalar_type();
    const int64_t rows = dy.size(0), in_features = weight.size(1), out_features = weight.size(0);
    const bool need_ds = need_dx || any(need_da), need_sum = need_dbias || any(need_dlora_bias);
    const Plan plan(rows, rows * weight.numel(), E::kBlockRows, E::kRowUnit);

    std::shared_ptr<const Packed> pack;
    if (need_dx) pack = packed(weight.t(), dtype, engine.strip(), kPair<T>, kPair<T>);
    Adapters adapters;
    if (need_ds)
      adapters =
          make_adapters(engine, dtype, lora_a, lora_b, false, need_dx, scaling, dropout_p, seed);
    Pass<E> pass{engine,       data<T>(dy), rows,    out_features,
                 dy.stride(0), pack.get(),  nullptr, adapters};
    pass.mask_expand = true;
    pass.shrinks = need_ds;
    const at::Tensor shrunk = at::empty({rows * adapters.padded * int64_t(sizeof(O))}, at::kByte);
    pass.shrunk = static_cast<O*>(shrunk.mutable_data_ptr());
    if (need_dx) {
      out.dx = empty_rows(rows, in_features, dy.options());
      pass.y = static_cast<T*>(out.dx->mutable_data_ptr());
    }

    // dB and the sum of dY ride on the tiles of dY
    Reduction<A> over_dy, over_x;
    at::Tensor s_rows;
    if (any(need_db) || need_sum) {
      s_rows = any(need_db) ? s->contiguous() : at::Tensor();
      pass.p = s_rows.defined() ? data<T>(s_rows) : nullptr;
      pass.p_rank = s_rows.defined() ? s_rows.size(1) : 0;
      over_dy = Reduction<A>(plan.chunks, pass.p_rank + (need_sum ? 1 : 0), out_features);
      pass.sums = &over_dy;
    }
    if (any(need_da)) over_x = Reduction<A>(plan.chunks, adapters.padded, in_features);

    auto reduce_x = [&](int64_t chunk, int64_t begin, int64_t end) {
      if (over_x.r) pass.reduce_expanded(*x, begin, end, over_x, chunk);
    };
    auto start = [&](int64_t chunk) {
      if (over_dy.r) over_dy.start(chunk);
      if (over_x.r) over_x.start(chunk);
    };
    if (need_ds || over_dy.r) run_pass(pass, plan, start, reduce_x);

    const A* dy_total = over_dy.r ? over_dy.total() : nullptr;
    const A* x_total = over_x.r ? over_x.total() : nullptr;
    int64_t offset = 0;
    for (size_t i = 0; i < n; ++i) {
      const int64_t rank = lora_a[i].size(0);
      if (need_da[i]) {
        const Adapter& a = adapters.each[i];
        out.da[i] = gradient(x_total, over_x.ld, a.padded_offset, rank, in_features, a.expand_scale,
                             false, lora_a[i].scalar_type());
      }
      if (need_db[i])
        out.db[i] = gradient(dy_total, over_dy.ld, offset, rank, out_features, 1.0, true,
                             lora_b[i].scalar_type());
      if (need_dlora_bias[i])
        out.dlora_bias[i] = gradient(dy_total, over_dy.ld, over_dy.r - 1, 1, out_features,
                                     scaling[i], false, lora_b[i].scalar_type())
                                .reshape({out_features});
      offset += rank;
    }
    if (need_dbias)
      out.dbias = gradient(dy_total, over_dy.ld, over_dy.r - 1, 1, out_features, 1.0, false, dtype)
                      .reshape({out_features});
  });
  return out;
}

} // namespace pelt_fast
