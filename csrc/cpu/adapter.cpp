// Bottleneck adapter, one pass over the rows forward and one backward:
//
//   z = x (+ skip);  v = LN(z) or z;  q = v Dᵀ + b_D;  a = act(q);  w = a Uᵀ + b_U
//   s = gate · keep · scaling · scale · w (+ x) (+ skip);  y = LN(s) or s
//
// A block of rows goes through all of it while it is in cache: v and w are tiles of whole rows,
// which a layernorm needs. Backward makes w and s again from q, which costs a sixth more products
// and saves a tensor of the size of x. Gradients of D and U are sums over rows, one partial per
// chunk of rows, added in order.
#include "adapter.h"

#include "adapter_block.h"
#include "matrix.h"

namespace pelt_fast {
std::tuple<at::Tensor, at::Tensor, OptionalTensor, OptionalTensor> bottleneck_adapter_fwd(
    const at::Tensor& x, const OptionalTensor& skip, const AdapterTensors& tensors,
    const AdapterSettings& settings) {
  check_memory("x", x);
  check_memory("skip", skip);
  check_memory("down_weight", tensors.down);
  check_memory("up_weight", tensors.up);
  check_memory_of(tensors);
  at::Tensor y, q;
  OptionalTensor pre_stats, post_stats;
  with_engine(x.scalar_type(), [&](const auto& engine) {
    using E = std::decay_t<decltype(engine)>;
    using T = typename E::T;
    using A = typename E::A;
    const Block<E> block(engine, x, skip, tensors.down.size(0), tensors, settings);
    const Matrix down(engine, tensors.down, tensors.down.requires_grad());
    const Matrix up(engine, tensors.up, tensors.up.requires_grad());
    const auto stats_type = x.options().dtype(at::CppTypeToScalarType<A>::value);
    y = empty_rows(block.rows, block.d, x.options());
    q = at::empty({block.rows, block.m}, x.options());
    if (tensors.pre_weight) pre_stats = at::empty({block.rows, 2}, stats_type);
    if (tensors.ln_weight) post_stats = at::empty({block.rows, 2}, stats_type);
    A* const pre = pre_stats ? static_cast<A*>(pre_stats->mutable_data_ptr()) : nullptr;
    A* const post = post_stats ? static_cast<A*>(post_stats->mutable_data_ptr()) : nullptr;
    T* const q_rows = static_cast<T*>(q.mutable_data_ptr());
    T* const y_rows = static_cast<T*>(y.mutable_data_ptr());

    block.plan().run([&](int64_t, bool, int64_t begin, int64_t end) {
      Workspace& w = workspace();
      const int64_t count = end - begin, mp = block.m_padded;
      A* a = w.delta.template get<A>(count * mp + mp);
      A* wide_q = a + count * mp; // of one row
      down.product(engine, count, block.left_inputs(begin, end, pre, w), a, mp);
      for (int64_t i = 0; i < count; ++i) {
        T* rounded = q_rows + (begin + i) * block.m;
        engine.kernels.narrow(block.m, a + i * mp, block.down_bias.get(), rounded);
        block.activate(rounded, wide_q, a + i * mp);
      }
      A* s = w.product.template get<A>(count * block.ld);
      up.product(engine, count, engine.left_of(count, block.m, {a, mp}, w.masked), s, block.ld);
      block.finish_rows(begin, end, s, post, y_rows, w.random);
      engine.finish();
    });
  });
  return {y, q, pre_stats, post_stats};
}

namespace {

template <class E>
struct Backward : BackwardAround<E> {
  using Base = BackwardAround<E>;
  using A = typename E::A;
  using Base::block, Base::need, Base::q, Base::pre, Base::kRun;

  const Matrix *const up, *const up_t, *const down_t; // null where no product needs them
  Reduction<A> ups, downs;

  Backward(Base&& base, int64_t chunks, const Matrix* up, const Matrix* up_t, const Matrix* down_t)
      : Base(std::move(base)), up(up), up_t(up_t), down_t(down_t) {
    if (need.up) ups = Reduction<A>(chunks, block.m, block.d);
    if (need.down) downs = Reduction<A>(chunks, block.m, block.d);
  }

  void start(int64_t chunk) const {
    Base::start(chunk);
    for (const Reduction<A>* sum : {&ups, &downs})
      if (sum->r) sum->start(chunk);
  }

  void run(int64_t chunk, int64_t begin, int64_t end) const {
    Workspace& w = workspace();
    const E& engine = block.engine;
    const int64_t count = end - begin, mp = block.m_padded, ld = block.ld, d = block.d;

    // tiles of the bottleneck: a, q and what becomes dq; one row of sums for b_D
    A* const a = w.delta.template get<A>(3 * count * mp + mp);
    A *const wide_q = a + count * mp, *const dq = wide_q + count * mp;
    A* const down_bias_sum = dq + count * mp;
    for (int64_t i = 0; i < count; ++i) block.activate(q[begin + i], wide_q + i * mp, a + i * mp);

    // what a few rows and what this block add to the sums, kept apart: the error of a sum grows
    // with the length of its runs
    A* const sums = w.shrunk.template get<A>((2 * kSums + 2) * ld);
    std::fill_n(sums, 2 * kSums * ld, A(0));
    A *const row_of_dy = sums + 2 * kSums * ld, *const row_of_w = row_of_dy + ld;

    A* const ds = w.product.template get<A>(count * ld);
    A* const dw = this->scales() ? w.right.template get<A>(count * ld) : ds;
    if (up) up->product(engine, count, engine.left_of(count, block.m, {a, mp}, w.masked), ds, ld);
    for (int64_t i = 0; i < count; ++i) {
      this->through_output(begin + i, ds + i * ld, dw + i * ld, sums, row_of_dy, row_of_w);
      if (i % kRun == kRun - 1) this->settle(chunk, sums);
    }

    if (need.dq()) {
      up_t->product(engine, count, engine.left_of(count, d, {dw, ld}, w.masked), dq, mp);
      this->through_activation(chunk, count, wide_q, dq, down_bias_sum);
    }
    if (need.up) reduce(ups, chunk, count, {a, mp}, {dw, ld});
    if (need.down)
      reduce(downs, chunk, count, {dq, mp},
             block.inputs(begin, end, const_cast<A*>(pre), false, w.left));
    if (need.dz()) {
      A* const dv = w.left.template get<A>(count * ld);
      down_t->product(engine, count, engine.left_of(count, block.m, {dq, mp}, w.masked), dv, ld);
      for (int64_t i = 0; i < count; ++i) {
        this->through_input(begin + i, ds + i * ld, dv + i * ld, sums, row_of_w);
        if (i % kRun == kRun - 1) this->settle(chunk, sums);
      }
    }
    this->settle(chunk, sums);
    engine.finish();
  }

 private:
  // sum (m, d) += p (count, m)ᵀ · rows (count, d)
  void reduce(const Reduction<A>& sum, int64_t chunk, int64_t count, Tile<A> p,
              Tile<A> rows) const {
    Workspace& w = workspace();
    const E& engine = block.engine;
    add_outer(engine, sum, chunk, count, p, engine.right_of(count, block.d, rows, w.masked));
  }
};

} // namespace

std::array<OptionalTensor, kAdapterGradients> bottleneck_adapter_bwd(
    const at::Tensor& dy, const at::Tensor& x, const OptionalTensor& skip, const at::Tensor& q,
    const OptionalTensor& pre_stats, const OptionalTensor& post_stats,
    const AdapterTensors& tensors, const AdapterSettings& settings,
    const std::vector<bool>& needs) {
  check_memory("dy", dy);
  check_memory("x", x);
  check_memory("skip", skip);
  check_memory("q", q);
  check_memory("pre_stats", pre_stats);
  check_memory("post_stats", post_stats);
  check_memory("down_weight", tensors.down);
  check_memory("up_weight", tensors.up);
  check_memory_of(tensors);
  std::array<OptionalTensor, kAdapterGradients> out;
  with_engine(x.scalar_type(), [&](const auto& engine) {
    using E = std::decay_t<decltype(engine)>;
    const Needs need(needs);
    const Block<E> block(engine, x, skip, tensors.down.size(0), tensors, settings);
    const Plan plan = block.plan();
    const int64_t d = block.d, m = block.m;
    std::optional<Matrix> up, up_t, down_t;
    if (post_stats || need.w()) up.emplace(engine, tensors.up, need.up);
    if (need.dq()) up_t.emplace(engine, tensors.up.t(), need.up);
    if (need.dz()) down_t.emplace(engine, tensors.down.t(), need.down);
    const auto pointer = [](const auto& matrix) { return matrix ? &*matrix : nullptr; };
    const Backward<E> backward({block, need, dy, q, pre_stats, post_stats, plan.chunks},
                               plan.chunks, pointer(up), pointer(up_t), pointer(down_t));
    plan.run([&](int64_t chunk, bool opens, int64_t begin, int64_t end) {
      if (opens) backward.start(chunk);
      backward.run(chunk, begin, end);
    });

    backward.collect(tensors, out.data(), 3, 5);
    if (need.down)
      out[2] = gradient(backward.downs.total(), backward.downs.ld, 0, m, d, 1.0, false,
                        tensors.down.scalar_type());
    if (need.up)
      out[4] = gradient(backward.ups.total(), backward.ups.ld, 0, m, d, 1.0, true,
                        tensors.up.scalar_type());
  });
  return out;
}

} // namespace pelt_fast
