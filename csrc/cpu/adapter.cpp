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

#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>

#include "blocks.h"
#include "engine.h"
#include "memory.h"
#include "packed.h"

namespace pelt_fast {
namespace {

Activation activation_of(const std::string& name) {
  constexpr const char* kNames[] = {"relu",  "gelu",    "gelu_tanh",  "silu",
                                    "tanh",  "sigmoid", "leaky_relu", "quick_gelu",
                                    "relu2", "relu6",   "mish",       "linear"};
  for (size_t i = 0; i < std::size(kNames); ++i)
    if (name == kNames[i]) return static_cast<Activation>(i);
  TORCH_CHECK_VALUE(false, "activation '", name, "' has no C++ kernel");
}

void check_memory_of(const AdapterTensors& t) {
  check_memory("down_weight", t.down);
  check_memory("down_bias", t.down_bias);
  check_memory("up_weight", t.up);
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

// A matrix (n, k), packed for products with rows of k; strips of at most the engine's width.
struct Matrix {
  std::shared_ptr<const Packed> pack;
  int64_t columns; // n, padded to the lanes

  template <class E>
  Matrix(const E& engine, const at::Tensor& source, bool trained)
      : columns(round_up(source.size(0), engine.lanes())) {
    using T = typename E::T;
    const int64_t width = std::min(engine.strip(), columns);
    pack = packed(source, dtype_of<T>(), width, kPair<T>, engine.lanes(), trained);
  }

  // c (m, columns) = or += a (m, k) · this
  template <class E>
  void product(const E& engine, int64_t m, Tile<typename E::Operand> a, typename E::A* c,
               int64_t ldc) const {
    using T = typename E::T;
    const int64_t k = round_up(pack->k, kPair<T>);
    for (int64_t s = 0, n0 = 0; n0 < columns; ++s, n0 += pack->strip)
      engine.gemm(m, std::min(pack->strip, columns - n0), k, a, pack->at<T>(s), pack->strip, c + n0,
                  ldc, false);
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

  Block(const E& engine, const at::Tensor& x, const OptionalTensor& skip,
        const AdapterTensors& tensors, const AdapterSettings& settings)
      : engine(engine),
        settings(settings),
        rows(x.size(0)),
        d(x.size(1)),
        m(tensors.down.size(0)),
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

  A weight_of(int64_t i) const {
    return factor * scale_of_one * (gate.get() ? gate.get()[i] : A(1));
  }
};

} // namespace

std::tuple<at::Tensor, at::Tensor, OptionalTensor, OptionalTensor> bottleneck_adapter_fwd(
    const at::Tensor& x, const OptionalTensor& skip, const AdapterTensors& tensors,
    const AdapterSettings& settings) {
  check_memory("x", x);
  check_memory("skip", skip);
  check_memory_of(tensors);
  at::Tensor y, q;
  OptionalTensor pre_stats, post_stats;
  with_engine(x.scalar_type(), [&](const auto& engine) {
    using E = std::decay_t<decltype(engine)>;
    using T = typename E::T;
    using A = typename E::A;
    const Block<E> block(engine, x, skip, tensors, settings);
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
      for (int64_t i = begin; i < end; ++i) {
        A* row = s + (i - begin) * block.ld;
        block.finish(i, block.words(i, w.random), row);
        if (!post) {
          engine.kernels.narrow(block.d, row, nullptr, y_rows + i * block.d);
          continue;
        }
        block.statistics(row, settings.eps, post + 2 * i);
        block.row().normalise(block.d, row, post[2 * i], post[2 * i + 1], block.ln_weight.get(),
                              block.ln_bias.get(), y_rows + i * block.d);
      }
      engine.finish();
    });
  });
  return {y, q, pre_stats, post_stats};
}

namespace {

// Which gradients are wanted; the order of GRADIENTS in pelt_fast/ops/adapter.py.
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
};

// Sums over rows that are vectors; each has a row of one Reduction.
enum Sums { kUpBias, kScale, kPreWeight, kPreBias, kLnWeight, kLnBias, kSums };

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

template <class E>
struct Backward {
  using T = typename E::T;
  using A = typename E::A;

  static constexpr int64_t kRun = 12; // rows in the shortest sums

  const Block<E>& block;
  const Needs need;
  const Rows<T> dy, q;
  const A *const pre, *const post;
  const Matrix *const up, *const up_t, *const down_t; // null where no product needs them
  Reduction<A> ups, downs;
  Reduction<double> vectors, down_biases; // over all rows: they are short, and may be exact
  T *dx = nullptr, *dskip = nullptr;
  A* dgate = nullptr;

  // Is dw something else than ds?
  bool scales() const {
    return block.mask || block.gate.get() || block.scale_of_each ||
           block.factor * block.scale_of_one != A(1);
  }

  void start(int64_t chunk) const {
    for (const Reduction<A>* sum : {&ups, &downs})
      if (sum->r) sum->start(chunk);
    for (const Reduction<double>* sum : {&vectors, &down_biases})
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
    A* const dw = scales() ? w.right.template get<A>(count * ld) : ds;
    if (up) up->product(engine, count, engine.left_of(count, block.m, {a, mp}, w.masked), ds, ld);
    for (int64_t i = 0; i < count; ++i) {
      through_output(begin + i, ds + i * ld, dw + i * ld, sums, row_of_dy, row_of_w);
      if (i % kRun == kRun - 1) settle(chunk, sums);
    }

    if (need.dq()) {
      up_t->product(engine, count, engine.left_of(count, d, {dw, ld}, w.masked), dq, mp);
      std::fill_n(down_bias_sum, mp, A(0));
      for (int64_t i = 0; i < count; ++i) {
        block.row().activate_backward(block.activation, mp, wide_q + i * mp, dq + i * mp);
        if (!need.down_bias) continue;
        block.row().add_wide(block.m, dq + i * mp, down_bias_sum);
        if (i % kRun == kRun - 1 || i == count - 1)
          move(block.m, down_bias_sum, down_biases.of(chunk));
      }
    }
    if (need.up) reduce(ups, chunk, count, {a, mp}, {dw, ld});
    if (need.down)
      reduce(downs, chunk, count, {dq, mp},
             block.inputs(begin, end, const_cast<A*>(pre), false, w.left));
    if (need.dz()) {
      A* const dv = w.left.template get<A>(count * ld);
      down_t->product(engine, count, engine.left_of(count, block.m, {dq, mp}, w.masked), dv, ld);
      for (int64_t i = 0; i < count; ++i) {
        through_input(begin + i, ds + i * ld, dv + i * ld, sums, row_of_w);
        if (i % kRun == kRun - 1) settle(chunk, sums);
      }
    }
    settle(chunk, sums);
    engine.finish();
  }

 private:
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

  // sum (m, d) += p (count, m)ᵀ · rows (count, d)
  void reduce(const Reduction<A>& sum, int64_t chunk, int64_t count, Tile<A> p,
              Tile<A> rows) const {
    Workspace& w = workspace();
    const E& engine = block.engine;
    const auto left = transposed(engine, count, block.m, p, w.transposed);
    engine.outer(block.m, block.d, count, left.data, left.stride,
                 engine.right_of(count, block.d, rows, w.masked), sum.of(chunk), sum.ld);
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
  check_memory_of(tensors);
  std::array<OptionalTensor, kAdapterGradients> out;
  with_engine(x.scalar_type(), [&](const auto& engine) {
    using E = std::decay_t<decltype(engine)>;
    using T = typename E::T;
    using A = typename E::A;
    const Needs need(needs);
    const Block<E> block(engine, x, skip, tensors, settings);
    const Plan plan = block.plan();
    const int64_t d = block.d, m = block.m, chunks = plan.chunks;
    std::optional<Matrix> up, up_t, down_t;
    if (post_stats || need.w()) up.emplace(engine, tensors.up, need.up);
    if (need.dq()) up_t.emplace(engine, tensors.up.t(), need.up);
    if (need.dz()) down_t.emplace(engine, tensors.down.t(), need.down);
    const auto pointer = [](const auto& matrix) { return matrix ? &*matrix : nullptr; };
    const at::Tensor q_rows = q.contiguous();
    // hooks on what autograd saves may give it back in another layout
    const at::Tensor pre = pre_stats ? pre_stats->contiguous() : at::Tensor();
    const at::Tensor post = post_stats ? post_stats->contiguous() : at::Tensor();
    Backward<E> backward{block,
                         need,
                         {data<T>(dy), dy.stride(0)},
                         {data<T>(q_rows), m},
                         pre.defined() ? data<A>(pre) : nullptr,
                         post.defined() ? data<A>(post) : nullptr,
                         pointer(up),
                         pointer(up_t),
                         pointer(down_t)};
    if (need.up) backward.ups = Reduction<A>(chunks, m, d);
    if (need.down) backward.downs = Reduction<A>(chunks, m, d);
    if (need.down_bias) backward.down_biases = Reduction<double>(chunks, 1, m);
    if (std::find(needs.begin() + 5, needs.end(), true) != needs.end())
      backward.vectors = Reduction<double>(chunks, kSums, d);
    const auto rows_like = [&](OptionalTensor& gradient) {
      gradient = empty_rows(block.rows, d, x.options());
      return static_cast<T*>(gradient->mutable_data_ptr());
    };
    if (need.x) backward.dx = rows_like(out[0]);
    if (need.skip) backward.dskip = rows_like(out[1]);
    at::Tensor gates;
    if (need.gate) {
      gates = at::empty({block.rows}, at::CppTypeToScalarType<A>::value);
      backward.dgate = static_cast<A*>(gates.mutable_data_ptr());
    }

    plan.run([&](int64_t chunk, bool opens, int64_t begin, int64_t end) {
      if (opens) backward.start(chunk);
      backward.run(chunk, begin, end);
    });

    if (need.down)
      out[2] = gradient(backward.downs.total(), backward.downs.ld, 0, m, d, 1.0, false,
                        tensors.down.scalar_type());
    if (need.down_bias)
      out[3] = gradient(backward.down_biases.total(), backward.down_biases.ld, 0, 1, m, 1.0, false,
                        tensors.down_bias->scalar_type())
                   .reshape({m});
    if (need.up)
      out[4] = gradient(backward.ups.total(), backward.ups.ld, 0, m, d, 1.0, true,
                        tensors.up.scalar_type());
    if (!backward.vectors.r) return;
    const double* sums = backward.vectors.total();
    const auto vector = [&](Sums which, const OptionalTensor& like) {
      return gradient(sums, backward.vectors.ld, which, 1, d, 1.0, false, like->scalar_type())
          .reshape({d});
    };
    if (need.up_bias) out[5] = vector(kUpBias, tensors.up_bias);
    if (need.scale) {
      const bool one = tensors.scale->numel() == 1 && d > 1;
      out[6] = one ? gradient(sums, backward.vectors.ld, kScale, 1, d, 1.0, false, at::kDouble)
                         .sum()
                         .reshape({1})
                         .to(tensors.scale->scalar_type())
                   : vector(kScale, tensors.scale);
    }
    if (need.gate) out[7] = gates.to(tensors.gate->scalar_type());
    if (need.pre_weight) out[8] = vector(kPreWeight, tensors.pre_weight);
    if (need.pre_bias) out[9] = vector(kPreBias, tensors.pre_bias);
    if (need.ln_weight) out[10] = vector(kLnWeight, tensors.ln_weight);
    if (need.ln_bias) out[11] = vector(kLnBias, tensors.ln_bias);
  });
  return out;
}

} // namespace pelt_fast
