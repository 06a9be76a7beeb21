// AdapterFusion in the bottleneck space, one pass over the rows forward and one backward. With v
// the adapters' input (adapter.cpp), u the query or v, N segments of the M columns, n(j) the
// segment of column j:
//
//   q = v Dᵀ + b_D;  h = act(q);  k = u Eᵀ + e;  score_n = Σ_{j in n} h_j k_j + k_{M+n}
//   p = softmax(keep · score / temperature);  w = [p_{n(j)} h_j, p_n] V;  s, y as in adapter.cpp
//
// An adapter whose activation is an attention: what is around it is adapter_block.h's. Backward
// makes h and w again from q; the sums over rows are as there.
#include "fusion.h"

#include "adapter_block.h"
#include "matrix.h"

namespace pelt_fast {
namespace {

void check_memory_of(const FusionTensors& t) {
  check_memory("down_weights", t.down);
  check_memory("score", t.score);
  check_memory("score_bias", t.score_bias);
  check_memory("value", t.value);
  check_memory_of(static_cast<const AdapterVectors&>(t));
}

// The settings of what is around the projections: dropout is the scores' alone.
AdapterSettings around(const FusionSettings& s) {
  return {s.activation, 1.0, s.pre_eps, s.eps, 0.0, s.skip_in, s.residual_x, s.residual_skip};
}

// The N segments, and what becomes of one row of them.
template <class E>
struct Attention {
  using T = typename E::T;
  using A = typename E::A;

  const E& engine;
  const std::vector<int64_t>& widths;
  const int64_t n, bottleneck, columns; // N, M, M + N
  const int64_t padded;                 // of a tile of the columns
  const A temperature, keep;            // keep: 1 / (1 - p) of dropout
  const Mask mask;
  const Rows<T> query;
  const int64_t features; // of the query
  const Vector<A> bias;

  Attention(const E& engine, const OptionalTensor& query, const FusionTensors& tensors,
            const FusionSettings& settings)
      : engine(engine),
        widths(settings.widths),
        n(int64_t(widths.size())),
        bottleneck(tensors.down.size(0)),
        columns(bottleneck + n),
        padded(round_up(columns, engine.lanes())),
        temperature(A(settings.temperature)),
        keep(A(keep_scale(make_mask(settings.dropout_p, tensors.seed, 0, n), settings.dropout_p))),
        mask(make_mask(settings.dropout_p, tensors.seed, 0, n)),
        query(rows_of<T>(query)),
        features(tensors.score.size(1)),
        bias(tensors.score_bias) {}

  // scale[i] = keep of score i, times its factor
  A factor(const uint32_t* words, int64_t i) const {
    return !words ? A(1) : words[i] >= mask.threshold ? keep : A(0);
  }
  const uint32_t* words(int64_t row, Scratch& random) const {
    return mask ? mask.words(engine.kernels, row, 0, n, random) : nullptr;
  }

  void probabilities(const A* h, const A* k, const uint32_t* words, A* p) const {
    for (int64_t i = 0, j = 0; i < n; j += widths[i++]) {
      const A score = engine.kernels.rows.dot(widths[i], h + j, k + j) + k[bottleneck + i];
      // what is dropped is gone, a NaN too
      p[i] = words && factor(words, i) == A(0) ? A(0) : score * factor(words, i) / temperature;
    }
    A most = p[0], sum = 0;
    for (int64_t i = 1; i < n; ++i) most = std::max(most, p[i]);
    for (int64_t i = 0; i < n; ++i) sum += p[i] = std::exp(p[i] - most);
    for (int64_t i = 0; i < n; ++i) p[i] /= sum;
  }

  // out (padded) = [p_{n(j)} h_j, p_n, 0]
  void weighted(const A* h, const A* p, A* out) const {
    for (int64_t i = 0, j = 0; i < n; ++i)
      for (const int64_t end = j + widths[i]; j < end; ++j) out[j] = p[i] * h[j];
    std::copy_n(p, n, out + bottleneck);
    std::fill(out + columns, out + padded, A(0));
  }

  // From da, the gradient of `weighted`, to those of h (padded with zeros to `end`) and of k.
  void backward(const A* h, const A* k, const A* p, const A* da, const uint32_t* words, int64_t end,
                A* dh, A* dk) const {
    A* const dscores = dk + bottleneck;
    A mean = 0;
    for (int64_t i = 0, j = 0; i < n; j += widths[i++]) {
      dscores[i] = engine.kernels.rows.dot(widths[i], da + j, h + j) + da[bottleneck + i];
      mean += p[i] * dscores[i];
    }
    for (int64_t i = 0, j = 0; i < n; ++i) {
      const A scale = factor(words, i);
      dscores[i] = scale == A(0) ? A(0) : p[i] * (dscores[i] - mean) / temperature * scale;
      for (const int64_t stop = j + widths[i]; j < stop; ++j) {
        dh[j] = p[i] * da[j] + dscores[i] * k[j];
        dk[j] = dscores[i] * h[j];
      }
    }
    std::fill(dh + bottleneck, dh + end, A(0));
    std::fill(dk + columns, dk + padded, A(0));
  }

  // A row has three products with about M columns: fewer of them than an adapter's are worth waking
  // a thread.
  Plan plan(const Block<E>& block) const {
    return Plan(block.rows, 3 * block.rows * block.d * columns, block.most_rows(), E::kRowUnit, 16);
  }

  // Rows of the query as the left and as the right operand of a product.
  Tile<typename E::Operand> left(int64_t begin, int64_t count, Workspace& w) const {
    return engine.left(count, features, query[begin], query.stride, Mask{}, begin, 0, w.masked,
                       w.random);
  }
  Tile<typename E::Operand> right(int64_t begin, int64_t count, Workspace& w) const {
    return engine.right(count, features, query[begin], query.stride, Mask{}, begin, 0, w.masked,
                        w.random);
  }
};

} // namespace

std::pair<at::Tensor, FusionSaved> adapter_fusion_fwd(const at::Tensor& x,
                                                      const OptionalTensor& skip,
                                                      const OptionalTensor& query,
                                                      const FusionTensors& tensors,
                                                      const FusionSettings& settings) {
  check_memory("x", x);
  check_memory("skip", skip);
  check_memory("query", query);
  check_memory_of(tensors);
  at::Tensor y;
  FusionSaved saved;
  with_engine(x.scalar_type(), [&](const auto& engine) {
    using E = std::decay_t<decltype(engine)>;
    using T = typename E::T;
    using A = typename E::A;
    const AdapterSettings outside = around(settings);
    const Block<E> block(engine, x, skip, tensors.down.size(0), tensors, outside);
    const Attention<E> attention(engine, query, tensors, settings);
    const Matrix down(engine, tensors.down, tensors.down.requires_grad(), settings.ours);
    const Matrix score(engine, tensors.score, tensors.score.requires_grad(), settings.ours);
    const Matrix value(engine, tensors.value.t(), tensors.value.requires_grad(), settings.ours);
    const auto wide = x.options().dtype(at::CppTypeToScalarType<A>::value);
    const int64_t columns = attention.columns, n = attention.n;
    y = empty_rows(block.rows, block.d, x.options());
    saved.q = at::empty({block.rows, block.m}, x.options());
    saved.k = at::empty({block.rows, columns}, x.options());
    saved.p = at::empty({block.rows, n}, wide);
    if (tensors.pre_weight) saved.pre_stats = at::empty({block.rows, 2}, wide);
    if (tensors.ln_weight) saved.post_stats = at::empty({block.rows, 2}, wide);
    const auto wide_rows = [](const OptionalTensor& t) {
      return t ? static_cast<A*>(t->mutable_data_ptr()) : nullptr;
    };
    A *const pre = wide_rows(saved.pre_stats), *const post = wide_rows(saved.post_stats);
    A* const p_rows = static_cast<A*>(saved.p.mutable_data_ptr());
    T* const q_rows = static_cast<T*>(saved.q.mutable_data_ptr());
    T* const k_rows = static_cast<T*>(saved.k.mutable_data_ptr());
    T* const y_rows = static_cast<T*>(y.mutable_data_ptr());

    attention.plan(block).run([&](int64_t, bool, int64_t begin, int64_t end) {
      Workspace& w = workspace();
      const int64_t count = end - begin, mp = block.m_padded, kp = attention.padded;
      A* const h = w.delta.template get<A>(count * (mp + 2 * kp) + mp);
      A *const k = h + count * mp, *const a = k + count * kp;
      A* const wide_q = a + count * kp; // of one row
      const auto left = block.left_inputs(begin, end, pre, w);
      down.product(engine, count, left, h, mp);
      if (!attention.query) score.product(engine, count, left, k, kp);
      if (attention.query) score.product(engine, count, attention.left(begin, count, w), k, kp);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t row = begin + i;
        A *const row_of_h = h + i * mp, *const row_of_k = k + i * kp;
        T *const q = q_rows + row * block.m, *const rounded_k = k_rows + row * columns;
        engine.kernels.narrow(block.m, row_of_h, block.down_bias.get(), q);
        block.activate(q, wide_q, row_of_h);
        engine.kernels.narrow(columns, row_of_k, attention.bias.get(), rounded_k);
        engine.kernels.widen(columns, kp, rounded_k, nullptr, 0, row_of_k);
        A* const p = p_rows + row * n;
        attention.probabilities(row_of_h, row_of_k, attention.words(row, w.random), p);
        attention.weighted(row_of_h, p, a + i * kp);
      }
      A* const s = w.product.template get<A>(count * block.ld);
      value.product(engine, count, engine.left_of(count, columns, {a, kp}, w.masked), s, block.ld);
      block.finish_rows(begin, end, s, post, y_rows, w.random);
      engine.finish();
    });
  });
  return {y, saved};
}

namespace {

// Which gradients of the attention are wanted; the rest is adapter_block.h's.
struct AttentionNeeds {
  bool query, score, score_bias, value;
  bool dk(bool dz) const { return query || score || score_bias || dz; }
};

// Those that the parts of an adapter share, in the order that they have there.
Needs shared(const std::vector<bool>& n) {
  return Needs({n[0], n[1], n[3], n[4], false, false, false, false, n[8], n[9], n[10], n[11]});
}

template <class E>
struct FusionBackward : BackwardAround<E> {
  using Base = BackwardAround<E>;
  using T = typename E::T;
  using A = typename E::A;
  using Base::block, Base::need, Base::q, Base::pre, Base::kRun;

  const Attention<E>& attention;
  const AttentionNeeds also;
  const at::Tensor k_tensor, p_tensor;
  const Rows<T> k_rows;
  const A* const p_rows;
  std::optional<Matrix> value, value_t, score_t, down_t; // those that a product needs
  Reduction<A> downs, scores, values;
  Reduction<double> score_biases;
  OptionalTensor of_query;
  T* dquery = nullptr;

  FusionBackward(Base&& base, const Attention<E>& attention, const AttentionNeeds& also,
                 const FusionSaved& saved, const FusionTensors& tensors, int64_t chunks)
      : Base(std::move(base)),
        attention(attention),
        also(also),
        k_tensor(saved.k.contiguous()),
        p_tensor(saved.p.contiguous()),
        k_rows{data<T>(k_tensor), attention.columns},
        p_rows(data<A>(p_tensor)) {
    const E& engine = block.engine;
    const int64_t columns = attention.columns;
    const bool through_query = also.query || (need.dz() && !attention.query);
    if (this->post) value.emplace(engine, tensors.value.t(), also.value);
    if (inside()) value_t.emplace(engine, tensors.value, also.value);
    if (through_query) score_t.emplace(engine, tensors.score.t(), also.score);
    if (need.dz()) down_t.emplace(engine, tensors.down.t(), need.down);
    if (need.down) downs = Reduction<A>(chunks, block.m, block.d);
    if (also.score) scores = Reduction<A>(chunks, columns, attention.features);
    if (also.value) values = Reduction<A>(chunks, columns, block.d);
    if (also.score_bias) score_biases = Reduction<double>(chunks, 1, columns);
    if (!also.query) return;
    of_query = empty_rows(block.rows, attention.features, k_tensor.options());
    dquery = static_cast<T*>(of_query->mutable_data_ptr());
  }

  // Does anything inside of V need a gradient?
  bool inside() const { return need.dq() || also.dk(false); }

  void start(int64_t chunk) const {
    Base::start(chunk);
    for (const Reduction<A>* sum : {&downs, &scores, &values})
      if (sum->r) sum->start(chunk);
    if (score_biases.r) score_biases.start(chunk);
  }

  void run(int64_t chunk, int64_t begin, int64_t end) const {
    Workspace& w = workspace();
    const E& engine = block.engine;
    const int64_t count = end - begin, d = block.d, ld = block.ld;
    const int64_t mp = block.m_padded, kp = attention.padded, columns = attention.columns;

    A* const h = w.delta.template get<A>(count * (3 * mp + 4 * kp) + mp + kp);
    A *const wide_q = h + count * mp, *const dq = wide_q + count * mp;
    A *const k = dq + count * mp, *const a = k + count * kp, *const da = a + count * kp;
    A *const dk = da + count * kp, *const bias_sum = dk + count * kp;
    A* const score_bias_sum = bias_sum + mp;
    for (int64_t i = 0; i < count; ++i) {
      block.activate(q[begin + i], wide_q + i * mp, h + i * mp);
      engine.kernels.widen(columns, kp, k_rows[begin + i], nullptr, 0, k + i * kp);
      attention.weighted(h + i * mp, p_of(begin + i), a + i * kp);
    }

    A* const sums = w.shrunk.template get<A>((2 * kSums + 2) * ld);
    std::fill_n(sums, 2 * kSums * ld, A(0));
    A *const row_of_dy = sums + 2 * kSums * ld, *const row_of_z = row_of_dy + ld;
    A* const ds = w.product.template get<A>(count * ld);
    if (value)
      value->product(engine, count, engine.left_of(count, columns, {a, kp}, w.masked), ds, ld);
    for (int64_t i = 0; i < count; ++i) {
      this->through_output(begin + i, ds + i * ld, ds + i * ld, sums, row_of_dy, row_of_z);
      if (i % kRun == kRun - 1) this->settle(chunk, sums);
    }

    if (also.value)
      add_outer(engine, values, chunk, count, {a, kp},
                engine.right_of(count, d, {ds, ld}, w.masked));
    if (inside()) {
      value_t->product(engine, count, engine.left_of(count, d, {ds, ld}, w.masked), da, kp);
      std::fill_n(score_bias_sum, kp, A(0));
      for (int64_t i = 0; i < count; ++i) {
        attention.backward(h + i * mp, k + i * kp, p_of(begin + i), da + i * kp,
                           attention.words(begin + i, w.random), mp, dq + i * mp, dk + i * kp);
        if (!also.score_bias) continue;
        block.row().add_wide(columns, dk + i * kp, score_bias_sum);
        if (i % kRun == kRun - 1 || i == count - 1)
          this->move(columns, score_bias_sum, score_biases.of(chunk));
      }
      if (need.dq()) this->through_activation(chunk, count, wide_q, dq, bias_sum);
    }
    const bool score_of_inputs = also.score && !attention.query;
    if (need.down || score_of_inputs) {
      const auto rows = engine.right_of(
          count, d, block.inputs(begin, end, const_cast<A*>(pre), false, w.left), w.masked);
      if (need.down) add_outer(engine, downs, chunk, count, {dq, mp}, rows);
      if (score_of_inputs) add_outer(engine, scores, chunk, count, {dk, kp}, rows);
    }
    if (also.score && attention.query)
      add_outer(engine, scores, chunk, count, {dk, kp}, attention.right(begin, count, w));
    if (also.query) through_query(begin, count, dk, w);
    if (need.dz()) {
      A* const dv = w.left.template get<A>(count * ld);
      down_t->product(engine, count, engine.left_of(count, block.m, {dq, mp}, w.masked), dv, ld);
      if (!attention.query)
        score_t->product(engine, count, engine.left_of(count, columns, {dk, kp}, w.masked), dv, ld,
                         true);
      for (int64_t i = 0; i < count; ++i) {
        this->through_input(begin + i, ds + i * ld, dv + i * ld, sums, row_of_z);
        if (i % kRun == kRun - 1) this->settle(chunk, sums);
      }
    }
    this->settle(chunk, sums);
    engine.finish();
  }

  void collect_all(const FusionTensors& like, OptionalTensor* out) const {
    this->collect(like, out, 4, 5);
    out[2] = of_query;
    const auto matrix = [](const Reduction<A>& sum, const at::Tensor& owner) {
      return gradient(sum.total(), sum.ld, 0, sum.r, sum.n, 1.0, false, owner.scalar_type());
    };
    if (need.down) out[3] = matrix(downs, like.down);
    if (also.score) out[5] = matrix(scores, like.score);
    if (also.score_bias)
      out[6] = gradient(score_biases.total(), score_biases.ld, 0, 1, attention.columns, 1.0, false,
                        like.score_bias->scalar_type())
                   .reshape({attention.columns});
    if (also.value) out[7] = matrix(values, like.value);
  }

 private:
  const A* p_of(int64_t row) const { return p_rows + row * attention.n; }

  void through_query(int64_t begin, int64_t count, const A* dk, Workspace& w) const {
    const E& engine = block.engine;
    const int64_t features = attention.features, wide = score_t->columns;
    A* const tile = w.left.template get<A>(count * wide);
    score_t->product(engine, count,
                     engine.left_of(count, attention.columns, {dk, attention.padded}, w.masked),
                     tile, wide);
    for (int64_t i = 0; i < count; ++i)
      engine.kernels.narrow(features, tile + i * wide, nullptr, dquery + (begin + i) * features);
  }
};

} // namespace

std::array<OptionalTensor, kFusionGradients> adapter_fusion_bwd(
    const at::Tensor& dy, const FusionSaved& saved, const at::Tensor& x, const OptionalTensor& skip,
    const OptionalTensor& query, const FusionTensors& tensors, const FusionSettings& settings,
    const std::vector<bool>& needs) {
  check_memory("dy", dy);
  check_memory("x", x);
  check_memory("skip", skip);
  check_memory("query", query);
  check_memory("q", saved.q);
  check_memory("k", saved.k);
  check_memory("p", saved.p);
  check_memory("pre_stats", saved.pre_stats);
  check_memory("post_stats", saved.post_stats);
  check_memory_of(tensors);
  std::array<OptionalTensor, kFusionGradients> out;
  with_engine(x.scalar_type(), [&](const auto& engine) {
    using E = std::decay_t<decltype(engine)>;
    const AdapterSettings outside = around(settings);
    const Block<E> block(engine, x, skip, tensors.down.size(0), tensors, outside);
    const Attention<E> attention(engine, query, tensors, settings);
    const Plan plan = attention.plan(block);
    FusionBackward<E> backward(
        {block, shared(needs), dy, saved.q, saved.pre_stats, saved.post_stats, plan.chunks},
        attention, {needs[2], needs[5], needs[6], needs[7]}, saved, tensors, plan.chunks);
    plan.run([&](int64_t chunk, bool opens, int64_t begin, int64_t end) {
      if (opens) backward.start(chunk);
      backward.run(chunk, begin, end);
    });
    backward.collect_all(tensors, out.data());
  });
  return out;
}

} // namespace pelt_fast
