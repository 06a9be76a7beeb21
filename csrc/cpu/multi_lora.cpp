// Batched multi-LoRA: y_t = base_t + c_t · (s_t B_gᵀ), s_t = drop(x_t) A_gᵀ, c_t = scaling_g ·
// row_scale_t, g the adapter of row t, and its gradients.
//
// Rows come by adapter, through the plan's permutation, in tiles that never hold two adapters. How
// a product is made depends on the adapter's own number of rows and on the shapes, on nothing else
// in the batch, and a sum over an adapter's rows runs in their order in one thread: so its results
// have the same bits alone and in any batch, with any number of threads.
#include "multi_lora.h"

#include <ATen/Functions.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "lora.h"
#include "lora_pass.h"
#include "multi_lora_call.h"

namespace pelt_fast {

using namespace multi;

namespace {

void check(const at::Tensor& x, const MultiLoRA& call) {
  check_memory("x", x);
  check_memory_of_all("lora_a", call.lora_a);
  check_memory_of_all("lora_b", call.lora_b);
  check_memory("plan", call.perm);
  check_memory("plan", call.indptr);
  check_memory_of_all("ranks", call.ranks);
  check_memory_of_all("scaling", call.scaling);
  check_memory("row_scale", call.row_scale);
}

// Zeros where no sum is written: adapters without rows, ranks beyond the adapter's.
template <class T>
at::Tensor gradient_of(const at::Tensor& stack, const Call<T>& call, int64_t i) {
  std::vector<bool> written(call.adapters);
  for (const Segment& s : call.segments)
    if (s.adapter >= 0) written[s.adapter] = call.rank(i, s.adapter) == call.most[i];
  return multi::gradient_of(stack, written);
}

} // namespace

MultiLoRA multi_lora_of(const at::Tensor& x, const std::vector<at::Tensor>& lora_a,
                        const std::vector<at::Tensor>& lora_b, const std::vector<at::Tensor>& plan,
                        const std::vector<at::Tensor>& ranks,
                        const std::vector<at::Tensor>& scaling, const OptionalTensor& row_scale,
                        double dropout_p, const OptionalTensor& seed) {
  MultiLoRA call{lora_a, lora_b, plan.at(1), plan.at(2), ranks, scaling, {}, dropout_p, seed};
  for (auto* each : {&call.ranks, &call.scaling})
    for (at::Tensor& t : *each) t = t.contiguous();
  const at::ScalarType wide = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  if (row_scale) call.row_scale = row_scale->to(wide).contiguous();
  return call;
}

namespace {

// From x to what an adapter adds to y.
template <class T>
struct Forward {
  using A = Acc<T>;
  const Call<T>& call;
  const T* x;
  int64_t features, stride;
  T* s; // (T, ΣR)

  // sums (tile's rows, ld) = c_t · s_t of projection i, whose rank is r, 0 too.
  void shrink(const Segment& tile, int64_t i, int64_t r, A* sums, int64_t ld) const {
    Workspace& w = workspace();
    const Work<T> work{call.kernels, w.random};
    const int64_t g = tile.adapter, step = r ? block_of(r) : features;
    for (int64_t k0 = 0; r && k0 < features; k0 += step) {
      const int64_t kc = std::min(step, features - k0);
      const auto rows =
          call.rows_in(tile, x, stride, k0, kc, kc, i, r > 2 * call.kernels.lanes, w.left);
      work.shrink(tile.rows, r, kc, rows.data(), call.a[i][g].t(), k0, sums, ld, k0 > 0,
                  tile.all >= kMany);
    }
    for (int64_t row = 0; row < tile.rows; ++row) {
      const int64_t t = call.perm[tile.begin + row];
      T* rounded = s + t * call.total + call.offset[i];
      std::fill_n(rounded, call.most[i], T{});
      if (!r) continue;
      A* sum = sums + row * ld;
      for (int64_t j = 0; j < r; ++j) sum[j] *= call.keep;
      call.kernels.narrow(r, sum, nullptr, rounded);
      call.kernels.widen(r, r, rounded, nullptr, 0, sum);
      const A factor = call.factor(i, g, t);
      for (int64_t j = 0; j < r; ++j) sum[j] *= factor;
    }
  }

  Matrix expander(int64_t i, int64_t g) const { return call.b[i][g].t(); }

  // Columns [n0, n0 + n) of the band's rows: c = or += sums · Bᵀ
  void expand(const Segment& band, int64_t i, int64_t r, const A* sums, int64_t ld, int64_t n0,
              int64_t n, const OutRowsOf<A>& c, bool accumulate) const {
    const Work<T> work{call.kernels, workspace().random};
    work.expand(band.rows, n, r, sums, ld, expander(i, band.adapter), n0, c, accumulate);
  }
};

// From dy to what an adapter adds to dx.
template <class T>
struct Backward {
  using A = Acc<T>;
  const Call<T>& call;
  const std::vector<at::Tensor>& dy;
  const T* s;
  T* ds;         // (T, ΣR)
  A* drow_scale; // (T,) or null

  // sums (tile's rows, ld) = ds_t of projection i, whose rank is r, 0 too.
  void shrink(const Segment& tile, int64_t i, int64_t r, A* sums, int64_t ld) const {
    Workspace& w = workspace();
    const Work<T> work{call.kernels, w.random};
    const int64_t g = tile.adapter, width = dy[i].size(1), step = r ? block_of(r) : width;
    for (int64_t n0 = 0; r && n0 < width; n0 += step) {
      const int64_t nc = std::min(step, width - n0);
      const auto rows = call.rows_in(tile, data<T>(dy[i]), dy[i].stride(0), n0, nc, nc, -1,
                                     r > 2 * call.kernels.lanes, w.left);
      work.shrink(tile.rows, r, nc, rows.data(), call.b[i][g], n0, sums, ld, n0 > 0,
                  tile.all >= kMany);
    }
    for (int64_t row = 0; r && row < tile.rows; ++row) {
      const int64_t t = call.perm[tile.begin + row], column = t * call.total + call.offset[i];
      A* sum = sums + row * ld;
      if (drow_scale) {
        A* s_row = w.masked.template get<A>(r);
        call.kernels.widen(r, r, s + column, nullptr, 0, s_row);
        A total = 0;
        for (int64_t j = 0; j < r; ++j) total += s_row[j] * sum[j];
        drow_scale[t] += call.scaling(i, g) * total;
      }
      const A factor = call.factor(i, g, t);
      for (int64_t j = 0; j < r; ++j) sum[j] *= factor;
      call.kernels.narrow(r, sum, nullptr, ds + column);
      call.kernels.widen(r, r, ds + column, nullptr, 0, sum);
    }
  }

  Matrix expander(int64_t i, int64_t g) const { return call.a[i][g]; }

  // Columns [n0, n0 + n) of the band's rows: c = or += drop(sums · A)
  void expand(const Segment& band, int64_t i, int64_t r, const A* sums, int64_t ld, int64_t n0,
              int64_t n, const OutRowsOf<A>& c, bool accumulate) const {
    Workspace& w = workspace();
    const Work<T> work{call.kernels, w.random};
    const Matrix a = expander(i, band.adapter);
    if (!call.dropout()) return work.expand(band.rows, n, r, sums, ld, a, n0, c, accumulate);
    const int64_t padded = round_up(n, call.kernels.lanes);
    A* memory = w.masked.template get<A>(band.rows * padded);
    OutRowsOf<A> delta;
    for (int64_t row = 0; row < band.rows; ++row) delta.rows[row] = memory + row * padded;
    work.expand(band.rows, n, r, sums, ld, a, n0, delta, false);
    for (int64_t row = 0; row < band.rows; ++row) {
      if (!accumulate) std::fill_n(c[row], padded, A(0));
      const uint32_t* words =
          call.masks[i].words(call.kernels, call.perm[band.begin + row], n0, n, w.random);
      call.kernels.add_masked(n, delta[row], call.keep, words, call.masks[i].threshold, c[row]);
    }
  }
};

// So many rows that the adapters ride on the product with W: rows are multiplied in the order of
// their adapters, and a block gets its adapters' part while it is in cache. Fewer are divided among
// threads better after the product.
// The adapter's sums have the same bits either way, y and dx in T = A alone: else the product below
// is rounded once more, before the adapters are added.
constexpr int64_t kRide = 128;

// Of rows with one projection, in `order`: product with W and what their adapters add.
template <class E, class Direction>
void ride(const E& engine, const Direction& direction, const at::Tensor& x,
          const at::Tensor& matrix, const at::Tensor& bias, const at::Tensor& y) {
  using T = typename E::T;
  using A = Acc<T>;
  const Call<T>& call = direction.call;
  const int64_t tokens = x.size(0), k = matrix.size(1), n = matrix.size(0);
  const auto pack = packed(matrix, x.scalar_type(), engine.strip(), kPair<T>, kPair<T>);
  const Adapters none;
  Pass<E> pass{engine, data<T>(x), tokens, k, x.stride(0), pack.get(), nullptr, none};
  if (bias.defined()) pass.bias = data<A>(bias);
  pass.shrinks = false;
  pass.y = static_cast<T*>(y.mutable_data_ptr());
  pass.order = call.perm.data();
  const int64_t ld = call.padded;
  const auto sums_of = [&](int64_t rows) { return workspace().shrunk.template get<A>(rows * ld); };
  pass.add = [&](int64_t begin, int64_t m, int64_t n0, int64_t width, A* c, int64_t ldc) {
    const A* sums = sums_of(m);
    call.parts(begin, begin + m, [&](const Segment& part) {
      const int64_t r = call.rank_of(0, part.adapter);
      if (!r) return;
      const Work<T> work{engine.kernels, workspace().random};
      work.bands(part.rows, direction.expander(0, part.adapter), width,
                 [&](int64_t row0, int64_t rows, int64_t first, int64_t columns) {
                   const Segment band{part.adapter, part.begin + row0, rows, part.all};
                   const int64_t first_row = band.begin - begin;
                   OutRowsOf<A> to;
                   for (int64_t row = 0; row < rows; ++row)
                     to.rows[row] = c + (first_row + row) * ldc + first;
                   direction.expand(band, 0, r, sums + first_row * ld, ld, n0 + first, columns, to,
                                    true);
                 });
    });
  };
  // each thread has about as much to do
  const int64_t threads = at::get_num_threads();
  const std::vector<int64_t> first = call.divided(threads, E::kRowUnit, [&](int64_t g) {
    return n * k + call.rank_of(0, g) * (n + k) * 3 / 2;
  });
  at::parallel_for(0, threads, 1, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) {
      const int64_t rows = first[i + 1] - first[i],
                    pieces = (rows + E::kBlockRows - 1) / E::kBlockRows;
      const int64_t size = pieces ? round_up((rows + pieces - 1) / pieces, E::kRowUnit) : 1;
      for (int64_t begin = first[i]; begin < first[i + 1]; begin += size) {
        const int64_t end = std::min(first[i + 1], begin + size);
        A* sums = sums_of(end - begin);
        call.parts(begin, end, [&](const Segment& part) {
          direction.shrink(part, 0, call.rank_of(0, part.adapter), sums + (part.begin - begin) * ld,
                           ld);
        });
        pass.block(begin, end, 0, pack->strips(), true, 0);
      }
    }
    engine.finish();
  });
}

} // namespace

MultiLoRAOutput multi_lora_fwd(const at::Tensor& x, const std::vector<OptionalTensor>& base,
                               const MultiLoRA& arguments, bool inplace) {
  check(x, arguments);
  for (const auto& b : base) check_memory("base_out", b);
  MultiLoRAOutput out;
  const int64_t tokens = x.size(0), features = x.size(1);
  with_engine(x.scalar_type(), [&](const auto& engine) {
    using T = typename std::decay_t<decltype(engine)>::T;
    using A = Acc<T>;
    const Kernels<T>& kernels = engine.kernels;
    const Call<T> call(arguments, kernels, tokens, features);
    std::vector<T*> to;
    std::vector<int64_t> width, to_stride;
    int64_t products = 0;
    for (int64_t i = 0; i < call.n(); ++i) {
      width.push_back(arguments.lora_b[i].size(1));
      out.y.push_back(inplace ? *base[i] : empty_rows(tokens, width[i], x.options()));
      to.push_back(static_cast<T*>(out.y[i].mutable_data_ptr()));
      to_stride.push_back(out.y[i].stride(0));
      products += tokens * call.most[i] * (features + width[i]);
    }
    out.s = at::empty({tokens, call.total}, x.options());
    const Forward<T> forward{call, data<T>(x), features, x.stride(0),
                             static_cast<T*>(out.s.mutable_data_ptr())};

    call.tiles(tokens, products, [&](const Segment& tile) {
      Workspace& w = workspace();
      const Work<T> work{kernels, w.random};
      const int64_t g = tile.adapter, m = tile.rows;
      for (int64_t i = 0; i < call.n(); ++i) {
        const int64_t r = call.rank_of(i, g), padded = round_up(r, kernels.lanes);
        A* sums = w.shrunk.template get<A>(m * padded);
        forward.shrink(tile, i, r, sums, padded);
        if (!r && inplace) continue;
        const bool add = bool(base[i]); // to the base, not to what is in memory
        work.bands(m, forward.expander(i, std::max<int64_t>(g, 0)), width[i],
                   [&](int64_t row0, int64_t rows, int64_t n0, int64_t nc) {
                     const Segment band{g, tile.begin + row0, rows, tile.all};
                     const auto c =
                         call.rows_out(tile, band, to[i], to_stride[i], n0, nc, w.product);
                     const int64_t ld = round_up(nc, kernels.lanes);
                     for (int64_t row = 0; row < rows; ++row) {
                       const int64_t t = call.perm[band.begin + row];
                       if (inplace && call.is_own(c[row], to[i] + t * to_stride[i] + n0)) continue;
                       if (add)
                         kernels.widen(nc, ld, data<T>(*base[i]) + t * base[i]->stride(0) + n0,
                                       nullptr, 0, c[row]);
                       else if (!r)
                         std::fill_n(c[row], ld, A(0));
                     }
                     if (r)
                       forward.expand(band, i, r, sums + row0 * padded, padded, n0, nc, c, add);
                     call.store(band, c, nc, to[i], to_stride[i], n0);
                   });
      }
    });
  });
  return out;
}

MultiLoRAOutput multi_lora_linear_fwd(const at::Tensor& x, const at::Tensor& weight,
                                      const OptionalTensor& bias, const MultiLoRA& arguments) {
  const int64_t tokens = x.size(0);
  if (tokens < kRide) {
    const at::Tensor y = std::get<0>(lora_linear_fwd(x, weight, bias, {}, {}, {}, {}, {}, {}));
    return multi_lora_fwd(x, {y}, arguments, true);
  }
  check(x, arguments);
  check_memory("weight", weight);
  check_memory("bias", bias);
  MultiLoRAOutput out;
  with_engine(x.scalar_type(), [&](const auto& engine) {
    using T = typename std::decay_t<decltype(engine)>::T;
    const Call<T> call(arguments, engine.kernels, tokens, x.size(1));
    out.y = {empty_rows(tokens, weight.size(0), x.options())};
    out.s = at::empty({tokens, call.total}, x.options());
    const Forward<T> forward{call, data<T>(x), x.size(1), x.stride(0),
                             static_cast<T*>(out.s.mutable_data_ptr())};
    ride(engine, forward, x, weight, total_bias<Acc<T>>(bias, {}, {}), out.y[0]);
  });
  return out;
}

MultiLoRAGradients multi_lora_bwd(const std::vector<at::Tensor>& dy, const at::Tensor& x,
                                  const at::Tensor& s, const MultiLoRA& arguments, bool need_dx,
                                  bool need_da, bool need_db, bool need_drow_scale,
                                  const OptionalTensor& weight) {
  check(x, arguments);
  check_memory_of_all("dy", dy);
  check_memory("s", s);
  check_memory("weight", weight);
  MultiLoRAGradients out;
  const int64_t tokens = x.size(0), features = x.size(1);
  const bool over_weight = need_dx && weight, riding = over_weight && tokens >= kRide;
  if (over_weight && !riding)
    out.dx =
        lora_linear_bwd(dy[0], {}, *weight, {}, {}, {}, {}, {}, {}, true, false, {}, {}, {}).dx;
  else if (need_dx)
    out.dx = empty_rows(tokens, features, x.options());
  with_engine(x.scalar_type(), [&](const auto& engine) {
    using T = typename std::decay_t<decltype(engine)>::T;
    using A = Acc<T>;
    const Kernels<T>& kernels = engine.kernels;
    const Call<T> call(arguments, kernels, tokens, features);
    std::vector<int64_t> width;
    int64_t products = 0;
    for (int64_t i = 0; i < call.n(); ++i) {
      width.push_back(arguments.lora_b[i].size(1));
      products += tokens * call.most[i] * (features + width[i]);
    }
    if (need_drow_scale)
      out.drow_scale = at::zeros({tokens}, x.options().dtype(at::CppTypeToScalarType<A>::value));
    const at::Tensor ds = at::empty({tokens, call.total}, x.options());
    const at::Tensor saved = s.contiguous();
    T* shrunk = static_cast<T*>(ds.mutable_data_ptr());
    const T* forward = data<T>(saved);
    T* dx = need_dx ? static_cast<T*>(out.dx->mutable_data_ptr()) : nullptr;
    const int64_t dx_stride = need_dx ? out.dx->stride(0) : 0;
    A* drow_scale = need_drow_scale ? static_cast<A*>(out.drow_scale->mutable_data_ptr()) : nullptr;
    const Backward<T> backward{call, dy, forward, shrunk, drow_scale};

    if (riding) {
      ride(engine, backward, dy[0], weight->t(), {}, *out.dx);
    } else if (need_dx || need_da || need_drow_scale) {
      call.tiles(tokens, products, [&](const Segment& tile) {
        Workspace& w = workspace();
        const Work<T> work{kernels, w.random};
        const int64_t g = tile.adapter, m = tile.rows;
        A* sums = w.shrunk.template get<A>(m * call.padded);
        std::vector<A*> of(call.n()); // null where the rank is 0
        for (int64_t i = 0; i < call.n(); ++i) {
          const int64_t r = call.rank_of(i, g);
          if (!r) continue;
          of[i] = sums + m * call.padded_offset[i];
          backward.shrink(tile, i, r, of[i], round_up(r, kernels.lanes));
        }
        if (!dx || (g < 0 && over_weight)) return;
        work.bands(m, backward.expander(0, std::max<int64_t>(g, 0)), features,
                   [&](int64_t row0, int64_t rows, int64_t k0, int64_t kc) {
                     const Segment band{g, tile.begin + row0, rows, tile.all};
                     const auto c = call.rows_out(tile, band, dx, dx_stride, k0, kc, w.product);
                     const int64_t ld = round_up(kc, kernels.lanes);
                     bool begun = over_weight;
                     for (int64_t row = 0; begun && row < rows; ++row) {
                       const T* base = dx + call.perm[band.begin + row] * dx_stride + k0;
                       if (!call.is_own(c[row], base))
                         kernels.widen(kc, ld, base, nullptr, 0, c[row]);
                     }
                     for (int64_t i = 0; i < call.n(); ++i) {
                       if (!of[i]) continue;
                       const int64_t r = call.rank_of(i, g), padded = round_up(r, kernels.lanes);
                       backward.expand(band, i, r, of[i] + row0 * padded, padded, k0, kc, c, begun);
                       begun = true;
                     }
                     for (int64_t row = 0; !begun && row < rows; ++row)
                       std::fill_n(c[row], ld, A(0));
                     call.store(band, c, kc, dx, dx_stride, k0);
                   });
      });
    }

    // p (rows, rank)ᵀ · rows (rows, columns) over the segment's rows in order, into columns [first,
    // first + columns) of a slot's gradient: element (j, column) lies at j · along_rank + column ·
    // along_columns, and one of these is 1
    auto sum_rows = [&](const at::Tensor& to, int64_t along_rank, int64_t along_columns,
                        const Segment& segment, int64_t rank, int64_t columns, int64_t first,
                        const auto& left, const auto& right) {
      const bool wide = to.scalar_type() == at::CppTypeToScalarType<A>::value;
      const int64_t padded = round_up(columns, kernels.lanes),
                    start = segment.adapter * to.stride(0) + first * along_columns;
      const bool there = wide && along_columns == 1 && padded == columns;
      const int64_t ld = there ? along_rank : padded;
      A* c = there ? static_cast<A*>(to.mutable_data_ptr()) + start
                   : workspace().product.template get<A>(rank * ld);
      for (int64_t r = 0; r < segment.rows; r += kChunk) {
        const Segment chunk{segment.adapter, segment.begin + r, std::min(kChunk, segment.rows - r),
                            segment.all};
        const auto rows = right(chunk, padded);
        kernels.rows.gemm_over(rank, padded, chunk.rows, left(chunk), chunk.rows, rows.data(), c,
                               ld, r > 0);
      }
      if (there) return;
      int64_t lines = rank, length = columns, apart = ld, stride = along_rank;
      if (along_columns != 1) {
        A* other = workspace().delta.template get<A>(columns * rank);
        kernels.transpose(rank, columns, c, ld, other, rank);
        c = other;
        lines = columns, length = rank, apart = rank, stride = along_columns;
      }
      for (int64_t i = 0; i < lines; ++i) {
        const int64_t at = start + i * stride;
        if (wide)
          std::copy_n(c + i * apart, length, static_cast<A*>(to.mutable_data_ptr()) + at);
        else
          kernels.narrow(length, c + i * apart, nullptr,
                         static_cast<T*>(to.mutable_data_ptr()) + at);
      }
    };
    std::vector<at::Tensor> da, db;
    if (need_da) {
      for (int64_t i = 0; i < call.n(); ++i)
        da.push_back(gradient_of(arguments.lora_a[i], call, i));
      call.sums(std::vector<int64_t>(call.n(), features),
                [&](const Segment& segment, int64_t i, int64_t first, int64_t columns) {
                  Workspace& w = workspace();
                  const int64_t r = call.rank(i, segment.adapter);
                  sum_rows(
                      da[i], da[i].stride(1), da[i].stride(2), segment, r, columns, first,
                      [&](const Segment& chunk) {
                        return call.turned(
                            chunk, shrunk, call.offset[i], r, [&](int64_t) { return call.keep; },
                            w.transposed);
                      },
                      [&](const Segment& chunk, int64_t ld) {
                        return call.rows_in(chunk, data<T>(x), x.stride(0), first, columns, ld, i,
                                            true, w.right);
                      });
                });
    }
    if (need_db) {
      for (int64_t i = 0; i < call.n(); ++i)
        db.push_back(gradient_of(arguments.lora_b[i], call, i));
      call.sums(width, [&](const Segment& segment, int64_t i, int64_t first, int64_t columns) {
        Workspace& w = workspace();
        const int64_t g = segment.adapter, r = call.rank(i, g);
        sum_rows(
            db[i], db[i].stride(2), db[i].stride(1), segment, r, columns, first,
            [&](const Segment& chunk) {
              return call.turned(
                  chunk, forward, call.offset[i], r,
                  [&](int64_t t) { return call.factor(i, g, t); }, w.transposed);
            },
            [&](const Segment& chunk, int64_t ld) {
              return call.rows_in(chunk, data<T>(dy[i]), dy[i].stride(0), first, columns, ld, -1,
                                  true, w.right);
            });
      });
    }
    for (int64_t i = 0; i < call.n(); ++i) {
      out.da.push_back(need_da ? OptionalTensor(like(da[i], arguments.lora_a[i])) : std::nullopt);
      out.db.push_back(need_db ? OptionalTensor(like(db[i], arguments.lora_b[i])) : std::nullopt);
    }
  });
  return out;
}

} // namespace pelt_fast
