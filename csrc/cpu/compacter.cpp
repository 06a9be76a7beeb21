// Compacter adapter, one pass over the rows forward and one backward: adapter.cpp's formulas, with
//
//   q[(b,z)] = Σ_i Σ_a rule[i,a,b] Σ_p v[(a,p)] Σ_k left[i,p,k] right[i,k,z] + b_D
//
// in the place of v Dᵀ + b_D, and likewise up. No Kronecker product is built. On the wide side a
// row is n rows of d / n, contracted with (or expanded from) g = n · k numbers each by one small
// matrix C (g, d / n) that all n share; between those n · g numbers and the bottleneck stands a
// small matrix M (n · g, m), made of the rule and of the other factor:
//
//   q = contract(v) M + b_D                  w = expand(a Mᵀ) + b_U
//   C[(i,k),p] = left[i,p,k]                 C[(i,k),p] = right[i,k,p]
//   M[(a,i,k),(b,z)] = rule[i,a,b] right[i,k,z]     M[(b,i,k),(a,z)] = rule[i,a,b] left[i,z,k]
//
// All products are in the accumulator's type: they are few. Backward makes the n · g numbers again.
// Blocks of rows and partial sums depend on T alone, so results do not on the number of threads.
#include "compacter.h"

#include "adapter_block.h"

namespace pelt_fast {
namespace {

constexpr int64_t kRows = 32;       // of a block: a tile of whole rows stays in level 2
constexpr int64_t kMostChunks = 64; // with partial sums of their own

struct FixedPlan : Plan {
  explicit FixedPlan(int64_t rows) : Plan(rows, 0, kRows, 1) {
    block = kRows;
    blocks = (rows + block - 1) / block;
    chunks = std::min(blocks, kMostChunks);
  }
};

void check_memory_of(const char* name, const Phm& weight) {
  check_memory(name, weight.rule);
  check_memory(name, weight.left);
  check_memory(name, weight.right);
}

// A factor in the accumulator's type, or its transpose.
template <class A>
struct Factor {
  at::Tensor tensor;
  const A* values;
  int64_t strides[3];

  Factor(const at::Tensor& source, bool turned)
      : tensor(source.to(at::CppTypeToScalarType<A>::value)),
        values(data<A>(tensor)),
        strides{tensor.stride(0), tensor.stride(turned ? 2 : 1), tensor.stride(turned ? 1 : 2)} {}
  A operator()(int64_t i, int64_t j, int64_t k) const {
    return values[i * strides[0] + j * strides[1] + k * strides[2]];
  }
};

// One projection, from its wide side to its narrow one: C and M.
template <class E>
struct Projection {
  using A = typename E::A;

  const E& engine;
  const bool up;                // its input is the narrow side
  const int64_t n, k, g, inner; // g = n · k, inner = n · g
  const int64_t width, m;       // d / n; of the bottleneck
  const int64_t ldc, ldm, ld;   // of C, of M, of tiles (T, inner) and of Mᵀ
  const Factor<A> rule, narrow; // (n, wide, narrow), (n, k, m / n)
  std::vector<A> c, mix, mix_t;

  Projection(const E& engine, const Phm& weight, bool up)
      : engine(engine),
        up(up),
        n(weight.rule.size(0)),
        k(weight.right.size(1)),
        g(n * k),
        inner(n * g),
        width((up ? weight.right : weight.left).size(up ? 2 : 1)),
        m(n * (up ? weight.left : weight.right).size(up ? 1 : 2)),
        ldc(round_up(width, engine.lanes())),
        ldm(round_up(m, engine.lanes())),
        ld(round_up(inner, engine.lanes())),
        rule(weight.rule, up),
        narrow(up ? weight.left : weight.right, up),
        c(g * ldc),
        mix(inner * ldm),
        mix_t(m * ld) {
    const Factor<A> wide(up ? weight.right : weight.left, !up); // (n, k, width)
    for (int64_t i = 0; i < n; ++i)
      for (int64_t r = 0; r < k; ++r)
        for (int64_t p = 0; p < width; ++p) c[(i * k + r) * ldc + p] = wide(i, r, p);
    each_mix([&](int64_t row, int64_t column, A of_rule, A of_narrow, int64_t, int64_t) {
      mix[row * ldm + column] = mix_t[column * ld + row] = of_rule * of_narrow;
    });
  }

  // body(row of M, column, rule's element, narrow's element, and their places)
  template <class Body>
  void each_mix(const Body& body) const {
    const int64_t columns = m / n;
    for (int64_t x = 0; x < n; ++x)
      for (int64_t i = 0; i < n; ++i)
        for (int64_t r = 0; r < k; ++r)
          for (int64_t y = 0; y < n; ++y) {
            const A of_rule = rule(i, x, y);
            for (int64_t z = 0; z < columns; ++z)
              body(x * g + i * k + r, y * columns + z, of_rule, narrow(i, r, z),
                   (i * n + x) * n + y, (i * k + r) * columns + z);
          }
  }

  // s (count, inner) of rows of v
  void contract(int64_t count, Tile<A> v, A* s) const {
    for (int64_t a = 0; a < n; ++a)
      engine.kernels.dots(count, g, width, v.data + a * width, v.stride, c.data(), ldc, s + a * g,
                          ld, false);
  }
  // Rows of out, of stride ldo >= d + lanes, from s. What a part writes too far, the next corrects.
  void expand(int64_t count, const A* s, A* out, int64_t ldo) const {
    for (int64_t a = 0; a < n; ++a)
      engine.kernels.gemm_wide(count, ldc, g, s + a * g, ld, c.data(), ldc, out + a * width, ldo,
                               false);
  }
  // (count, inner) -> (count, m), and back
  void to_narrow(int64_t count, const A* s, A* q) const {
    engine.kernels.gemm_wide(count, ldm, inner, s, ld, mix.data(), ldm, q, ldm, false);
  }
  void from_narrow(int64_t count, const A* q, A* s) const {
    engine.kernels.gemm_wide(count, ld, m, q, ldm, mix_t.data(), ld, s, ld, false);
  }
};

// The adapter's input, rows [begin, end), in the accumulator's type; x itself where it is that.
template <class E>
Tile<typename E::A> wide_inputs(const Block<E>& block, int64_t begin, int64_t end,
                                typename E::A* stats, Scratch& scratch) {
  if constexpr (std::is_same_v<typename E::T, typename E::A>)
    if (block.plain()) return {block.x[begin], block.x.stride};
  return block.inputs(begin, end, stats, true, scratch);
}

} // namespace

std::tuple<at::Tensor, at::Tensor, OptionalTensor, OptionalTensor> compacter_fwd(
    const at::Tensor& x, const OptionalTensor& skip, const CompacterTensors& tensors,
    const AdapterSettings& settings) {
  check_memory("x", x);
  check_memory("skip", skip);
  check_memory_of("down", tensors.down);
  check_memory_of("up", tensors.up);
  check_memory_of(tensors);
  at::Tensor y, q;
  OptionalTensor pre_stats, post_stats;
  with_engine(x.scalar_type(), [&](const auto& engine) {
    using E = std::decay_t<decltype(engine)>;
    using T = typename E::T;
    using A = typename E::A;
    const Projection<E> down(engine, tensors.down, false), up(engine, tensors.up, true);
    const Block<E> block(engine, x, skip, down.m, tensors, settings);
    const auto stats_type = x.options().dtype(at::CppTypeToScalarType<A>::value);
    y = empty_rows(block.rows, block.d, x.options());
    q = at::empty({block.rows, block.m}, x.options());
    if (tensors.pre_weight) pre_stats = at::empty({block.rows, 2}, stats_type);
    if (tensors.ln_weight) post_stats = at::empty({block.rows, 2}, stats_type);
    A* const pre = pre_stats ? static_cast<A*>(pre_stats->mutable_data_ptr()) : nullptr;
    A* const post = post_stats ? static_cast<A*>(post_stats->mutable_data_ptr()) : nullptr;
    T* const q_rows = static_cast<T*>(q.mutable_data_ptr());
    T* const y_rows = static_cast<T*>(y.mutable_data_ptr());

    FixedPlan(block.rows).run([&](int64_t, bool, int64_t begin, int64_t end) {
      Workspace& w = workspace();
      const int64_t count = end - begin, mp = block.m_padded;
      A* a = w.delta.template get<A>(count * mp + mp);
      A* wide_q = a + count * mp; // of one row
      A* inner = w.shrunk.template get<A>(count * std::max(down.ld, up.ld));
      down.contract(count, wide_inputs(block, begin, end, pre, w.left), inner);
      down.to_narrow(count, inner, a);
      for (int64_t i = 0; i < count; ++i) {
        T* rounded = q_rows + (begin + i) * block.m;
        engine.kernels.narrow(block.m, a + i * mp, block.down_bias.get(), rounded);
        block.activate(rounded, wide_q, a + i * mp);
      }
      A* s = w.product.template get<A>(count * block.ld);
      up.from_narrow(count, a, inner);
      up.expand(count, inner, s, block.ld);
      block.finish_rows(begin, end, s, post, y_rows, w.random);
    });
  });
  return {y, q, pre_stats, post_stats};
}

namespace {

// Which of a projection's gradients are wanted, and the sums over rows that they come from.
template <class E>
struct ProjectionGradients {
  using A = typename E::A;

  const Projection<E>& projection;
  const bool need_rule, need_left, need_right;
  Reduction<A> c, mix; // of C and of M

  ProjectionGradients(const Projection<E>& projection, const std::vector<bool>& needs, size_t first,
                      int64_t chunks)
      : projection(projection),
        need_rule(needs[first]),
        need_left(needs[first + 1]),
        need_right(needs[first + 2]) {
    if (of_c()) c = Reduction<A>(chunks, projection.g, projection.width);
    if (of_mix()) mix = Reduction<A>(chunks, projection.inner, projection.m);
  }

  bool of_c() const { return projection.up ? need_right : need_left; }
  bool of_mix() const { return need_rule || (projection.up ? need_left : need_right); }

  void start(int64_t chunk) const {
    for (const Reduction<A>* sum : {&c, &mix})
      if (sum->r) sum->start(chunk);
  }

  // Adds count rows. Of what lies between the factors, (count, inner): `inner` goes with the wide
  // rows, and `contracted`, which those were contracted to, with the narrow ones.
  void add(int64_t chunk, int64_t count, const A* inner, Tile<A> wide, const A* contracted,
           const A* narrow, Scratch& scratch) const {
    const Projection<E>& p = projection;
    A* turned = scratch.get<A>(p.inner * kRows);
    const auto& kernels = p.engine.kernels;
    if (mix.r) {
      kernels.transpose(count, p.inner, contracted, p.ld, turned, kRows);
      kernels.gemm_wide(p.inner, p.ldm, count, turned, kRows, narrow, p.ldm, mix.of(chunk), mix.ld,
                        true);
    }
    if (!c.r) return;
    kernels.transpose(count, p.inner, inner, p.ld, turned, kRows);
    for (int64_t a = 0; a < p.n; ++a)
      kernels.gemm_wide(p.g, p.ldc, count, turned + a * p.g * kRows, kRows, wide.data + a * p.width,
                        wide.stride, c.of(chunk), c.ld, true);
  }

  // Into out[0..2]: rule, left, right.
  void collect(const Phm& weight, OptionalTensor* out) const {
    const Projection<E>& p = projection;
    const int64_t columns = p.m / p.n;
    if (c.r) {
      const at::Tensor& owner = p.up ? weight.right : weight.left;
      const at::Tensor found =
          gradient(c.total(), c.ld, 0, p.g, p.width, 1.0, false, owner.scalar_type())
              .view({p.n, p.k, p.width});
      out[p.up ? 2 : 1] = p.up ? found : found.transpose(1, 2).contiguous();
    }
    if (!mix.r) return;
    const A* sums = mix.total();
    at::Tensor of_rule = at::zeros({p.n, p.n, p.n}, at::kDouble),
               of_narrow = at::zeros({p.n, p.k, columns}, at::kDouble);
    double *const rules = of_rule.mutable_data_ptr<double>(), *const narrows =
                                                                  of_narrow
                                                                      .mutable_data_ptr<double>();
    p.each_mix(
        [&](int64_t row, int64_t column, A rule, A narrow, int64_t at_rule, int64_t at_narrow) {
          const double sum = double(sums[row * mix.ld + column]);
          rules[at_rule] += sum * double(narrow);
          narrows[at_narrow] += sum * double(rule);
        });
    const auto finished = [&](const at::Tensor& sum, const at::Tensor& owner) {
      return (p.up ? sum.transpose(1, 2) : sum).to(owner.scalar_type()).contiguous();
    };
    if (need_rule) out[0] = finished(of_rule, weight.rule);
    if (p.up ? need_left : need_right)
      out[p.up ? 1 : 2] = finished(of_narrow, p.up ? weight.left : weight.right);
  }
};

template <class E>
struct Backward : BackwardAround<E> {
  using Base = BackwardAround<E>;
  using A = typename E::A;
  using Base::block, Base::need, Base::q, Base::pre, Base::kRun;

  const Projection<E>&down, &up;
  ProjectionGradients<E> of_down, of_up;

  Backward(Base&& base, const Projection<E>& down, const Projection<E>& up,
           const std::vector<bool>& needs, int64_t chunks)
      : Base(std::move(base)),
        down(down),
        up(up),
        of_down(down, needs, 2, chunks),
        of_up(up, needs, 6, chunks) {}

  void start(int64_t chunk) const {
    Base::start(chunk);
    of_down.start(chunk);
    of_up.start(chunk);
  }

  void run(int64_t chunk, int64_t begin, int64_t end) const {
    Workspace& w = workspace();
    const int64_t count = end - begin, mp = block.m_padded, ld = block.ld;

    // tiles of the bottleneck: a, q and what becomes dq; one row of sums for b_D
    A* const a = w.delta.template get<A>(3 * count * mp + mp);
    A *const wide_q = a + count * mp, *const dq = wide_q + count * mp;
    for (int64_t i = 0; i < count; ++i) block.activate(q[begin + i], wide_q + i * mp, a + i * mp);
    // what lies between the factors, of either projection, and its gradient
    const int64_t inner_size = count * std::max(down.ld, up.ld);
    A* const inner = w.masked.template get<A>(2 * inner_size);
    A* const d_inner = inner + inner_size;

    // what a few rows and what this block add to the sums, kept apart
    A* const sums = w.shrunk.template get<A>((2 * kSums + 2) * ld);
    std::fill_n(sums, 2 * kSums * ld, A(0));
    A *const row_of_dy = sums + 2 * kSums * ld, *const row_of_w = row_of_dy + ld;

    A* const ds = w.product.template get<A>(count * ld);
    A* const dw = this->scales() ? w.right.template get<A>(count * ld) : ds;
    const bool needs_w = this->post || need.w();
    if (needs_w || of_up.of_c()) up.from_narrow(count, a, inner);
    if (needs_w) up.expand(count, inner, ds, ld);
    for (int64_t i = 0; i < count; ++i) {
      this->through_output(begin + i, ds + i * ld, dw + i * ld, sums, row_of_dy, row_of_w);
      if (i % kRun == kRun - 1) this->settle(chunk, sums);
    }

    if (need.dq() || of_up.of_mix()) up.contract(count, {dw, ld}, d_inner);
    if (need.up) of_up.add(chunk, count, inner, {dw, ld}, d_inner, a, w.transposed);
    if (need.dq()) {
      up.to_narrow(count, d_inner, dq);
      this->through_activation(chunk, count, wide_q, dq, dq + count * mp);
    }
    if (need.dz() || of_down.of_c()) down.from_narrow(count, dq, d_inner);
    if (need.down) {
      const Tile<A> v = block.inputs(begin, end, const_cast<A*>(pre), false, w.left);
      if (of_down.of_mix()) down.contract(count, v, inner);
      of_down.add(chunk, count, d_inner, v, inner, dq, w.transposed);
    }
    if (need.dz()) {
      A* const dv = w.left.template get<A>(count * ld);
      down.expand(count, d_inner, dv, ld);
      for (int64_t i = 0; i < count; ++i) {
        this->through_input(begin + i, ds + i * ld, dv + i * ld, sums, row_of_w);
        if (i % kRun == kRun - 1) this->settle(chunk, sums);
      }
    }
    this->settle(chunk, sums);
  }
};

} // namespace

std::array<OptionalTensor, kCompacterGradients> compacter_bwd(
    const at::Tensor& dy, const at::Tensor& x, const OptionalTensor& skip, const at::Tensor& q,
    const OptionalTensor& pre_stats, const OptionalTensor& post_stats,
    const CompacterTensors& tensors, const AdapterSettings& settings,
    const std::vector<bool>& needs) {
  check_memory("dy", dy);
  check_memory("x", x);
  check_memory("skip", skip);
  check_memory("q", q);
  check_memory("pre_stats", pre_stats);
  check_memory("post_stats", post_stats);
  check_memory_of("down", tensors.down);
  check_memory_of("up", tensors.up);
  check_memory_of(tensors);
  // one flag for the three tensors of a projection
  std::vector<bool> collapsed{needs[0], needs[1], needs[2] || needs[3] || needs[4], needs[5],
                              needs[6] || needs[7] || needs[8]};
  collapsed.insert(collapsed.end(), needs.begin() + 9, needs.end());
  std::array<OptionalTensor, kCompacterGradients> out;
  with_engine(x.scalar_type(), [&](const auto& engine) {
    using E = std::decay_t<decltype(engine)>;
    const Needs need(collapsed);
    const Projection<E> down(engine, tensors.down, false), up(engine, tensors.up, true);
    const Block<E> block(engine, x, skip, down.m, tensors, settings);
    const FixedPlan plan(block.rows);
    const Backward<E> backward({block, need, dy, q, pre_stats, post_stats, plan.chunks}, down, up,
                               needs, plan.chunks);
    plan.run([&](int64_t chunk, bool opens, int64_t begin, int64_t end) {
      if (opens) backward.start(chunk);
      backward.run(chunk, begin, end);
    });
    backward.collect(tensors, out.data(), 5, 9);
    backward.of_down.collect(tensors.down, out.data() + 2);
    backward.of_up.collect(tensors.up, out.data() + 6);
  });
  return out;
}

} // namespace pelt_fast
