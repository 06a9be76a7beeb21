// Batched bottleneck adapters, g the adapter of row t:
//
//   q_t = x_t D_gᵀ + b_D;  a_t = act(q_t);  w_t = a_t U_gᵀ + b_U
//   s_t = gate_t · keep · scaling · scale_g · w_t (+ x_t) (+ residual_t);  y_t = LN(s_t) or s_t
//
// and its gradients. Rows without an adapter, or with one of width 0, have no w. Rows come by
// adapter, a tile of whole rows at a time, which a layernorm needs. Backward makes w and s again
// from q; what an adapter's sums over rows are of is kept in the order of the plan, and each sum
// runs over the adapter's rows in their order in one thread: so its results have the same bits
// alone and in any batch, with any number of threads.
#include "multi_bottleneck.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "adapter_block.h"
#include "multi_rows.h"

namespace pelt_fast {

using namespace multi;

namespace {

constexpr int64_t kShort = 12; // rows in the shortest sums

// Some consecutive tiles, with sums over their rows of their own.
struct Batch {
  int64_t index;
  std::vector<Segment> tiles;
};

template <class T>
struct MultiCall {
  using A = Acc<T>;
  const MultiBottleneck& call;
  const Kernels<T>& kernels;
  const int64_t rows, d, adapters, most; // T, d, L, M
  const int64_t ld;                      // of a tile of whole rows
  const int64_t padded;                  // M in whole vectors
  const Activation activation;
  const Rows<T> x, residual;
  const Stack<T> down, up;
  const Vector<A> down_bias, up_bias, scale, gate, ln_weight, ln_bias;
  const Mask mask;
  const A constant; // scaling, and 1 / (1 - p)
  const at::Tensor widths;
  const Order order;
  std::vector<Batch> batches;
  std::vector<int64_t> costs;

  MultiCall(const MultiBottleneck& call, const Kernels<T>& kernels, const at::Tensor& x,
            const OptionalTensor& residual)
      : call(call),
        kernels(kernels),
        rows(x.size(0)),
        d(x.size(1)),
        adapters(call.down.size(0)),
        most(call.down.size(1)),
        ld(round_up(d, 2 * kernels.lanes) + 16), // rows must not fall into the same cache sets
        padded(round_up(most, kernels.lanes)),
        activation(activation_of(call.activation)),
        x{data<T>(x), x.stride(0)},
        residual(pelt_fast::rows_of<T>(residual)),
        down(call.down),
        up(call.up),
        down_bias(call.down_bias),
        up_bias(call.up_bias),
        scale(call.scale),
        gate(call.gate),
        ln_weight(call.ln_weight),
        ln_bias(call.ln_bias),
        mask(make_mask(call.dropout_p, call.seed, 0, d)),
        constant(A(call.scaling * keep_scale(mask, call.dropout_p))),
        widths(call.widths.contiguous()),
        order(call.plan.at(1), call.plan.at(2), rows, adapters) {
    // of as many rows whatever the threads: sums over the rows of a batch depend on it
    const int64_t size = std::clamp<int64_t>(round_up((rows + 7) / 8, 8), 8, kChunk);
    int64_t room = 0;
    for (const Segment& s : order.segments)
      for (int64_t r = 0, count; r < s.rows; r += count) {
        count = std::min(size, s.rows - r);
        if (count > room) {
          batches.push_back({int64_t(batches.size()), {}});
          costs.push_back(0);
          room = size;
        }
        room -= count;
        batches.back().tiles.push_back({s.adapter, s.begin + r, count, s.all});
        costs.back() += count * (width(s.adapter) + 8);
      }
  }

  int64_t width(int64_t g) const {
    return g < 0 ? 0 : std::clamp<int64_t>(widths.const_data_ptr<int32_t>()[g], 0, most);
  }
  int64_t products() const { return rows * most * d; }
  int64_t row(int64_t position) const { return order.perm[position]; }
  // what w of row t of adapter g is multiplied with, but for the gate; and with it
  A scale_of(int64_t g) const { return scale.get() ? constant * scale.get()[g] : constant; }
  A factor(int64_t g, int64_t t) const {
    return gate.get() ? scale_of(g) * gate.get()[t] : scale_of(g);
  }
  bool factors() const { return mask || scale.get() || gate.get() || constant != A(1); }
  const A* down_bias_of(int64_t g) const {
    return down_bias.get() ? down_bias.get() + g * most : nullptr;
  }
  const A* up_bias_of(int64_t g) const { return up_bias.get() ? up_bias.get() + g * d : nullptr; }
  const uint32_t* words(int64_t t) const {
    return mask ? mask.words(kernels, t, 0, d, workspace().random) : nullptr;
  }

  // body(batch), batches in any order and thread
  template <class Body>
  void each_batch(const Body& body) const {
    share(batches, costs, products() < Plan::kAlone ? 1 : at::get_num_threads(), body);
  }

  // a (rows, m padded) of the saved q, in the tile's order; q itself, wide, to `wide` unless null
  void activations(const Segment& tile, const T* q, A* a, int64_t lda) const {
    const int64_t m = width(tile.adapter), mp = round_up(m, kernels.lanes);
    A* wide = workspace().masked.template get<A>(mp);
    for (int64_t i = 0; i < tile.rows; ++i) {
      kernels.widen(m, mp, q + row(tile.begin + i) * most, nullptr, 0, wide);
      kernels.rows.activate(activation, mp, wide, a + i * lda);
    }
  }

  // w (rows, d), without b_U
  void up_products(const Segment& tile, const A* a, int64_t lda, A* w) const {
    const Work<T> work{kernels, workspace().random};
    const Matrix b = up[tile.adapter].t();
    work.bands(tile.rows, b, d, [&](int64_t row0, int64_t count, int64_t n0, int64_t n) {
      work.expand(count, n, width(tile.adapter), a + row0 * lda, lda, b, n0,
                  tile_rows(w + row0 * ld + n0, count), false);
    });
  }

  // Rows of a tile as addresses.
  OutRowsOf<A> tile_rows(A* first, int64_t count) const {
    OutRowsOf<A> out;
    for (int64_t i = 0; i < count; ++i) out.rows[i] = first + i * ld;
    return out;
  }

  // w of row t, without b_U, becomes s; without an adapter s is made of nothing.
  void finish(int64_t g, int64_t t, const uint32_t* words, A* w) const {
    const T* own = call.residual_x ? x[t] : nullptr;
    const T* other = residual ? residual[t] : nullptr;
    if (width(g)) {
      kernels.rows.combine(d, up_bias_of(g), factor(g, t), nullptr, words, mask.threshold, own,
                           other, w);
      return;
    }
    std::fill_n(w, d, A(0));
    kernels.rows.combine(d, nullptr, A(1), nullptr, nullptr, 0, own, other, w);
  }
};

void check(const at::Tensor& x, const OptionalTensor& residual, const MultiBottleneck& call) {
  check_memory("x", x);
  check_memory("residual", residual);
  check_memory("down_weight", call.down);
  check_memory("up_weight", call.up);
  check_memory("down_bias", call.down_bias);
  check_memory("up_bias", call.up_bias);
  check_memory("scaling", call.scale);
  check_memory("gate", call.gate);
  check_memory("ln_weight", call.ln_weight);
  check_memory("ln_bias", call.ln_bias);
  check_memory("widths", call.widths);
  check_memory("plan", call.plan.at(1));
  check_memory("plan", call.plan.at(2));
}

} // namespace

std::tuple<at::Tensor, at::Tensor, OptionalTensor> multi_bottleneck_fwd(
    const at::Tensor& x, const OptionalTensor& residual, const MultiBottleneck& arguments) {
  check(x, residual, arguments);
  at::Tensor y, q;
  OptionalTensor stats;
  with_engine(x.scalar_type(), [&](const auto& engine) {
    using T = typename std::decay_t<decltype(engine)>::T;
    using A = Acc<T>;
    const Kernels<T>& kernels = engine.kernels;
    const MultiCall<T> call(arguments, kernels, x, residual);
    const int64_t d = call.d, most = call.most;
    y = empty_rows(call.rows, d, x.options());
    q = at::empty({call.rows, most}, x.options());
    if (arguments.ln_weight)
      stats = at::empty({call.rows, 2}, x.options().dtype(at::CppTypeToScalarType<A>::value));
    T* const out = static_cast<T*>(y.mutable_data_ptr());
    T* const saved = static_cast<T*>(q.mutable_data_ptr());
    A* const post = stats ? static_cast<A*>(stats->mutable_data_ptr()) : nullptr;

    call.each_batch([&](const Batch& batch) {
      Workspace& w = workspace();
      const Work<T> work{kernels, w.random};
      for (const Segment& tile : batch.tiles) {
        const int64_t g = tile.adapter, m = call.width(g), mp = round_up(m, kernels.lanes);
        A* const s = w.product.template get<A>(tile.rows * call.ld);
        A* const a = w.shrunk.template get<A>(tile.rows * mp);
        const int64_t step = m ? block_of(m) : d;
        for (int64_t k = 0; m && k < d; k += step) {
          const int64_t kc = std::min(step, d - k);
          const auto rows = rows_in(kernels, call.order.perm, tile, call.x.data, call.x.stride, k,
                                    kc, kc, nullptr, m > 2 * kernels.lanes, w.left);
          work.shrink(tile.rows, m, kc, rows.data(), call.down[g].t(), k, a, mp, k > 0,
                      tile.all >= kMany);
        }
        for (int64_t i = 0; i < tile.rows; ++i) {
          T* rounded = saved + call.row(tile.begin + i) * most;
          if (m) kernels.narrow(m, a + i * mp, call.down_bias_of(g), rounded);
          std::fill(rounded + m, rounded + most, T{});
        }
        if (m) {
          call.activations(tile, saved, a, mp);
          call.up_products(tile, a, mp, s);
        }
        for (int64_t i = 0; i < tile.rows; ++i) {
          const int64_t t = call.row(tile.begin + i);
          A* of_row = s + i * call.ld;
          call.finish(g, t, m ? call.words(t) : nullptr, of_row);
          if (!post) {
            kernels.narrow(d, of_row, nullptr, out + t * d);
            continue;
          }
          A* stat = post + 2 * t;
          kernels.rows.moments(d, of_row, stat, stat + 1);
          stat[1] = A(1) / std::sqrt(stat[1] + A(arguments.eps));
          kernels.rows.normalise(d, of_row, stat[0], stat[1], call.ln_weight.get(),
                                 call.ln_bias.get(), out + t * d);
        }
      }
    });
  });
  return {y, q, stats};
}

namespace {

// Which gradients are wanted.
struct MultiNeeds {
  bool x, residual, down, down_bias, up, up_bias, scale, gate, ln_weight, ln_bias;

  explicit MultiNeeds(const std::vector<bool>& n)
      : x(n[0]),
        residual(n[1]),
        down(n[2]),
        down_bias(n[3]),
        up(n[4]),
        up_bias(n[5]),
        scale(n[6]),
        gate(n[7]),
        ln_weight(n[8]),
        ln_bias(n[9]) {}

  bool w() const { return scale || gate; }
  bool dq() const { return x || down || down_bias; }
  bool layernorm() const { return ln_weight || ln_bias; }
};

// Rows over which an adapter's gradients are sums: of the batch, or of a tensor in the plan's
// order.
template <class T>
struct Summed {
  using A = Acc<T>;
  const MultiCall<T>& call;
  const Rows<T>* source; // null: ordered
  const A* ordered;
  int64_t stride;

  // Columns [first, first + n) of the rows, to be read up to padded.
  ListedRows<A> listed(const Segment& chunk, int64_t first, int64_t n, int64_t width,
                       Scratch& scratch) const {
    if (source)
      return rows_in(call.kernels, call.order.perm, chunk, source->data, source->stride, first, n,
                     width, nullptr, true, scratch);
    ListedRows<A> rows;
    for (int64_t i = 0; i < chunk.rows; ++i) rows[i] = ordered + (chunk.begin + i) * stride + first;
    return rows;
  }
  // The same as columns: (n, rows)
  const A* turned(const Segment& chunk, int64_t first, int64_t n, Scratch& scratch) const {
    A* out = scratch.template get<A>(n * chunk.rows);
    if (!source) {
      call.kernels.transpose(chunk.rows, n, ordered + chunk.begin * stride + first, stride, out,
                             chunk.rows);
      return out;
    }
    const auto rows = listed(chunk, first, n, n, workspace().masked);
    for (int64_t i = 0; i < chunk.rows; ++i)
      for (int64_t j = 0; j < n; ++j) out[j * chunk.rows + i] = rows[i][j];
    return out;
  }
};

template <class T>
struct MultiBackward {
  using A = Acc<T>;
  const MultiCall<T>& call;
  const MultiNeeds need;
  const at::Tensor q_rows, stats_rows; // hooks may give saved tensors back in another layout
  const Rows<T> dy;
  const T* const q;
  const A* const stats;
  // in the plan's order, rows apart by call.ld and call.padded
  at::Tensor kept_dw, kept_a, kept_dq, kept_dscale;
  A *dw = nullptr, *a = nullptr, *dq = nullptr, *dscale = nullptr, *dgate = nullptr;
  T *dx = nullptr, *dresidual = nullptr;
  std::array<OptionalTensor, kMultiBottleneckGradients> out;
  at::Tensor of_layernorm; // (batches, 2 d)

  MultiBackward(const MultiCall<T>& call, const MultiNeeds& need, const at::Tensor& dy,
                const at::Tensor& q, const OptionalTensor& stats)
      : call(call),
        need(need),
        q_rows(q.contiguous()),
        stats_rows(stats ? stats->contiguous() : at::Tensor()),
        dy{data<T>(dy), dy.stride(0)},
        q(data<T>(q_rows)),
        stats(stats_rows.defined() ? data<A>(stats_rows) : nullptr) {
    const auto wide = dy.options().dtype(at::CppTypeToScalarType<A>::value);
    const auto keep = [&](at::Tensor& kept, bool wanted, int64_t columns) {
      if (!wanted) return static_cast<A*>(nullptr);
      kept = empty_rows(call.rows, columns, wide);
      return static_cast<A*>(kept.mutable_data_ptr());
    };
    dw = keep(kept_dw, need.up || need.up_bias, call.ld);
    a = keep(kept_a, need.up, call.padded);
    dq = keep(kept_dq, need.down || need.down_bias, call.padded);
    dscale = keep(kept_dscale, need.scale, 1);
    const auto rows_like = [&](OptionalTensor& gradient) {
      gradient = empty_rows(call.rows, call.d, dy.options());
      return static_cast<T*>(gradient->mutable_data_ptr());
    };
    if (need.x) dx = rows_like(out[0]);
    if (need.residual) dresidual = rows_like(out[1]);
    if (need.gate) {
      out[7] = at::empty({call.rows}, wide);
      dgate = static_cast<A*>(out[7]->mutable_data_ptr());
    }
    if (need.layernorm())
      of_layernorm = empty_rows(int64_t(call.batches.size()), 2 * call.d, wide.dtype(at::kDouble));
  }

  void run(const Batch& batch) const {
    Workspace& w = workspace();
    // what a few rows add to the layernorm's sums, kept apart: the error of a sum grows with the
    // length of its runs
    const int64_t d = call.d, ld = call.ld;
    A* const few = w.transposed.template get<A>(4 * ld);
    std::fill_n(few, 2 * ld, A(0));
    double* const sums = need.layernorm() ? static_cast<double*>(of_layernorm.mutable_data_ptr()) +
                                                batch.index * 2 * d
                                          : nullptr;
    if (sums) std::fill_n(sums, 2 * d, 0.0);
    int64_t held = 0;
    const auto settle = [&] {
      for (int64_t k = 0; sums && k < 2; ++k)
        for (int64_t j = 0; j < d; ++j) sums[k * d + j] += double(few[k * ld + j]);
      std::fill_n(few, 2 * ld, A(0));
      held = 0;
    };
    for (const Segment& tile : batch.tiles) {
      const int64_t g = tile.adapter, m = call.width(g);
      const bool kept = m && dw, factors = m && call.factors();
      A* const dw_rows = kept ? dw + tile.begin * ld : nullptr;
      A* const ds = kept && !factors ? dw_rows : w.product.template get<A>(tile.rows * ld);
      A* const dw_tile = !factors ? ds : kept ? dw_rows : w.left.template get<A>(tile.rows * ld);
      if (m && (a || stats || need.w())) {
        A* const a_tile =
            a ? a + tile.begin * call.padded : w.shrunk.template get<A>(tile.rows * call.padded);
        call.activations(tile, q, a_tile, call.padded);
        if (stats || need.w()) call.up_products(tile, a_tile, call.padded, ds);
      }
      for (int64_t i = 0; i < tile.rows; ++i) {
        through_output(g, tile.begin + i, ds + i * ld, dw_tile + i * ld, few, few + 2 * ld,
                       few + 3 * ld);
        if (++held == kShort) settle();
      }
      if (m && need.dq()) {
        A* const dq_tile =
            dq ? dq + tile.begin * call.padded : w.shrunk.template get<A>(tile.rows * call.padded);
        through_activation(tile, dw_tile, dq_tile);
        if (dx) through_input(tile, dq_tile, ds);
      } else if (dx) {
        for (int64_t i = 0; i < tile.rows; ++i) {
          T* const row = dx + call.row(tile.begin + i) * d;
          if (call.call.residual_x)
            call.kernels.narrow(d, ds + i * ld, nullptr, row);
          else
            std::fill_n(row, d, T{});
        }
      }
    }
    settle();
  }

  // The gradients of the parameters, from what the rows left.
  void collect() {
    const MultiBottleneck& of = call.call;
    std::vector<bool> whole(call.adapters);
    for (const Segment& s : call.order.segments)
      if (s.adapter >= 0) whole[s.adapter] = call.width(s.adapter) == call.most;
    if (need.down) out[2] = gradient_of(of.down, whole);
    if (need.up) out[4] = gradient_of(of.up, whole);
    const auto zeros = [](const OptionalTensor& like) {
      return at::zeros(like->sizes(), like->options());
    };
    if (need.down_bias) out[3] = zeros(of.down_bias);
    if (need.up_bias) out[5] = zeros(of.up_bias);
    if (need.scale) out[6] = zeros(of.scale);

    struct Task {
      const Segment* segment;
      int64_t begin, columns; // of the features
    };
    std::vector<Task> tasks;
    std::vector<int64_t> costs;
    const int64_t threads = at::get_num_threads();
    const bool few = int64_t(call.order.segments.size()) < 4 * threads;
    for (const Segment& s : call.order.segments) {
      const int64_t m = call.width(s.adapter);
      if (!m) continue;
      const int64_t width = std::clamp<int64_t>(65536 / m / 64 * 64, 64, few ? 256 : 1024);
      for (int64_t c = 0; c < call.d; c += width) {
        tasks.push_back({&s, c, std::min(width, call.d - c)});
        // what is written costs too
        costs.push_back((s.rows + 8) * m * tasks.back().columns);
      }
    }
    if (need.down || need.up || need.down_bias || need.up_bias || need.scale)
      share(tasks, costs, threads,
            [&](const Task& task) { sums(*task.segment, task.begin, task.columns); });
    if (need.gate) out[7] = out[7]->to(of.gate->scalar_type());
    if (need.layernorm()) {
      double* total = static_cast<double*>(of_layernorm.mutable_data_ptr());
      for (int64_t i = 1; i < of_layernorm.size(0); ++i)
        for (int64_t j = 0; j < 2 * call.d; ++j) total[j] += total[i * 2 * call.d + j];
      const auto vector = [&](int64_t k, const OptionalTensor& like) {
        return gradient(total, call.d, k, 1, call.d, 1.0, false, like->scalar_type())
            .reshape({call.d});
      };
      if (need.ln_weight) out[8] = vector(0, of.ln_weight);
      if (need.ln_bias) out[9] = vector(1, of.ln_bias);
    }
    if (need.down) out[2] = like(*out[2], of.down);
    if (need.up) out[4] = like(*out[4], of.up);
  }

 private:
  // ds holds w of a row, without b_U; it becomes the gradient of s, and dw_row that of w.
  void through_output(int64_t g, int64_t position, A* ds, A* dw_row, A* few, A* row_of_dy,
                      A* row_of_w) const {
    const RowKernels<T>& row = call.kernels.rows;
    const int64_t d = call.d, t = call.row(position);
    const bool any = call.width(g) > 0;
    const uint32_t* words = any ? call.words(t) : nullptr;
    if (any && need.w()) {
      std::copy_n(ds, d, row_of_w);
      row.combine(d, call.up_bias_of(g), A(1), nullptr, words, call.mask.threshold, nullptr,
                  nullptr, row_of_w);
    }
    if (stats) {
      call.finish(g, t, words, ds);
      call.kernels.widen(d, d, dy[t], nullptr, 0, row_of_dy);
      row.normalise_backward(d, row_of_dy, stats[2 * t], stats[2 * t + 1], call.ln_weight.get(), ds,
                             need.ln_weight ? few : nullptr,
                             need.ln_bias ? few + call.ld : nullptr);
    } else {
      call.kernels.widen(d, d, dy[t], nullptr, 0, ds);
    }
    if (dresidual) call.kernels.narrow(d, ds, nullptr, dresidual + t * d);
    const A along = any && need.w() ? row.dot(d, ds, row_of_w) : A(0);
    if (dgate) dgate[t] = any ? call.scale_of(g) * along : A(0);
    if (dscale)
      dscale[position] = call.constant * (call.gate.get() ? call.gate.get()[t] : A(1)) * along;
    if (!any || dw_row == ds) return;
    std::copy_n(ds, d, dw_row);
    row.combine(d, nullptr, call.factor(g, t), nullptr, words, call.mask.threshold, nullptr,
                nullptr, dw_row);
  }

  // dq (rows, m) of a tile's dw (rows, d)
  void through_activation(const Segment& tile, const A* dw_tile, A* dq_tile) const {
    const Kernels<T>& kernels = call.kernels;
    Workspace& w = workspace();
    const Work<T> work{kernels, w.random};
    const int64_t g = tile.adapter, m = call.width(g), mp = round_up(m, kernels.lanes),
                  step = block_of(m);
    for (int64_t n = 0; n < call.d; n += step) {
      ListedRows<A> rows;
      for (int64_t i = 0; i < tile.rows; ++i) rows[i] = dw_tile + i * call.ld + n;
      work.shrink(tile.rows, m, std::min(step, call.d - n), rows.data(), call.up[g], n, dq_tile,
                  call.padded, n > 0, tile.all >= kMany);
    }
    A* wide = w.masked.template get<A>(mp);
    for (int64_t i = 0; i < tile.rows; ++i) {
      kernels.widen(m, mp, q + call.row(tile.begin + i) * call.most, nullptr, 0, wide);
      kernels.rows.activate_backward(call.activation, mp, wide, dq_tile + i * call.padded);
    }
  }

  // dx of a tile, from its dq and, where x is added to the result, ds
  void through_input(const Segment& tile, const A* dq_tile, const A* ds) const {
    const Kernels<T>& kernels = call.kernels;
    Workspace& w = workspace();
    const Work<T> work{kernels, w.random};
    const int64_t m = call.width(tile.adapter), ld = call.ld, d = call.d;
    A* const dv = w.left.template get<A>(tile.rows * ld);
    const Matrix b = call.down[tile.adapter];
    work.bands(tile.rows, b, d, [&](int64_t row0, int64_t count, int64_t n0, int64_t n) {
      work.expand(count, n, m, dq_tile + row0 * call.padded, call.padded, b, n0,
                  call.tile_rows(dv + row0 * ld + n0, count), false);
    });
    for (int64_t i = 0; i < tile.rows; ++i)
      kernels.rows.narrow_sum(d, dv + i * ld, call.call.residual_x ? ds + i * ld : nullptr,
                              dx + call.row(tile.begin + i) * d);
  }

  // An adapter's gradients, of its matrices and b_U in columns [first, first + n) of the features.
  void sums(const Segment& s, int64_t first, int64_t n) const {
    const int64_t m = call.width(s.adapter);
    const Summed<T> of_x{call, &call.x, nullptr, 0}, of_dw{call, nullptr, dw, call.ld},
        of_a{call, nullptr, a, call.padded}, of_dq{call, nullptr, dq, call.padded};
    if (need.down) {
      const at::Tensor& to = *out[2]; // (L, M, d)
      if (to.stride(2) == 1)
        matrix_sum(to, s, of_dq, 0, m, to.stride(1), of_x, first, n);
      else
        matrix_sum(to, s, of_x, first, n, to.stride(2), of_dq, 0, m);
    }
    if (need.up) {
      const at::Tensor& to = *out[4]; // (L, d, M)
      if (to.stride(2) == 1)
        matrix_sum(to, s, of_dw, first, n, to.stride(1), of_a, 0, m);
      else
        matrix_sum(to, s, of_a, 0, m, to.stride(2), of_dw, first, n);
    }
    if (need.up_bias) vector_sum(*out[5], s, dw, call.ld, first, n);
    if (first) return;
    if (need.down_bias) vector_sum(*out[3], s, dq, call.padded, 0, m);
    if (need.scale) vector_sum(*out[6], s, dscale, 1, 0, 1);
  }

  // Element (i, j) of the adapter's part, i · apart + j from its first on: the sum over its rows of
  // left's column i times right's column j.
  void matrix_sum(const at::Tensor& to, const Segment& s, const Summed<T>& left, int64_t left0,
                  int64_t lines, int64_t apart, const Summed<T>& right, int64_t right0,
                  int64_t columns) const {
    Workspace& w = workspace();
    const int64_t padded = round_up(columns, call.kernels.lanes),
                  start = s.adapter * to.stride(0) + left0 * apart + right0;
    const bool wide = to.scalar_type() == at::CppTypeToScalarType<A>::value,
               there = wide && padded == columns;
    const int64_t ld = there ? apart : padded;
    A* const c = there ? static_cast<A*>(to.mutable_data_ptr()) + start
                       : w.product.template get<A>(lines * ld);
    for (int64_t r = 0; r < s.rows; r += kChunk) {
      const Segment chunk{s.adapter, s.begin + r, std::min(kChunk, s.rows - r), s.all};
      const auto rows = right.listed(chunk, right0, columns, padded, w.right);
      call.kernels.rows.gemm_over(lines, padded, chunk.rows,
                                  left.turned(chunk, left0, lines, w.transposed), chunk.rows,
                                  rows.data(), c, ld, r > 0);
    }
    for (int64_t i = 0; !there && i < lines; ++i) store(to, start + i * apart, c + i * ld, columns);
  }

  // Elements [first, first + n) of the adapter's vector: the sum over its rows, in the plan's
  // order and `stride` apart.
  void vector_sum(const at::Tensor& to, const Segment& s, const A* rows, int64_t stride,
                  int64_t first, int64_t n) const {
    Workspace& w = workspace();
    double* const sum = w.product.template get<double>(n);
    A* const few = w.shrunk.template get<A>(n);
    std::fill_n(sum, n, 0.0);
    for (int64_t r = 0; r < s.rows; r += kShort) {
      std::fill_n(few, n, A(0));
      for (int64_t i = r; i < std::min(r + kShort, s.rows); ++i)
        call.kernels.rows.add_wide(n, rows + (s.begin + i) * stride + first, few);
      for (int64_t j = 0; j < n; ++j) sum[j] += double(few[j]);
    }
    std::copy_n(sum, n, few);
    store(to, s.adapter * to.stride(0) + first, few, n);
  }

  // into elements of a gradient, from `at` on
  void store(const at::Tensor& to, int64_t at, const A* from, int64_t n) const {
    if (to.scalar_type() == at::CppTypeToScalarType<A>::value)
      std::copy_n(from, n, static_cast<A*>(to.mutable_data_ptr()) + at);
    else
      call.kernels.narrow(n, from, nullptr, static_cast<T*>(to.mutable_data_ptr()) + at);
  }
};

} // namespace

std::array<OptionalTensor, kMultiBottleneckGradients> multi_bottleneck_bwd(
    const at::Tensor& dy, const at::Tensor& x, const OptionalTensor& residual, const at::Tensor& q,
    const OptionalTensor& stats, const MultiBottleneck& arguments, const std::vector<bool>& needs) {
  check(x, residual, arguments);
  check_memory("dy", dy);
  check_memory("q", q);
  check_memory("stats", stats);
  std::array<OptionalTensor, kMultiBottleneckGradients> out;
  with_engine(x.scalar_type(), [&](const auto& engine) {
    using T = typename std::decay_t<decltype(engine)>::T;
    const MultiCall<T> call(arguments, engine.kernels, x, residual);
    MultiBackward<T> backward(call, MultiNeeds(needs), dy, q, stats);
    call.each_batch([&](const Batch& batch) { backward.run(batch); });
    backward.collect();
    out = std::move(backward.out);
  });
  return out;
}

} // namespace pelt_fast
