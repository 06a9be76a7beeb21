// A scale and a bias by element, of an adapter for each row: y = x · scales[g] + biases[g].
//
// Every element of x and dy is read once and every result written once, so that memory is all that
// bounds it: plain loops, which the compiler vectorises, are as fast as any. Backward goes adapter
// by adapter, a block of features at a time, and adds the rows of an adapter in their order, in
// chunks that begin where the adapter's rows begin: its gradients depend neither on the other rows
// of the batch nor on the number of threads.
#include "multi_elementwise.h"

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "memory.h"

namespace pelt_fast {
namespace {

constexpr int64_t kGrain = 1 << 15; // elements that are worth another thread
constexpr int64_t kBlock = 128;     // features of a block: its sums stay in level 1
constexpr int64_t kChunk = 64;      // rows that are added before their sum is

// Rows (T, features), last stride 1; none where there is no tensor.
template <class T>
struct Rows {
  const T* data = nullptr;
  int64_t stride = 0;

  explicit Rows(const OptionalTensor& t) {
    if (t) data = t->const_data_ptr<T>(), stride = t->stride(0);
  }
  const T* at(int64_t row) const { return data ? data + row * stride : nullptr; }
};

template <class X, class P>
void row_of(int64_t n, const X* x, const P* scale, const P* bias, X* y) {
  using A = at::opmath_type<X>;
  if (scale && bias)
    for (int64_t i = 0; i < n; ++i) y[i] = X(A(x[i]) * A(scale[i]) + A(bias[i]));
  else if (scale)
    for (int64_t i = 0; i < n; ++i) y[i] = X(A(x[i]) * A(scale[i]));
  else
    for (int64_t i = 0; i < n; ++i) y[i] = X(A(x[i]) + A(bias[i]));
}

template <class X, class P>
at::Tensor forward(const at::Tensor& x, const OptionalTensor& scales, const OptionalTensor& biases,
                   const int32_t* bucket) {
  const int64_t tokens = x.size(0), features = x.size(1);
  const int64_t adapters = (scales ? *scales : *biases).size(0);
  at::Tensor out = empty_rows(tokens, features, x.options());
  const Rows<X> rows(x);
  const Rows<P> scale(scales), bias(biases);
  X* y = out.mutable_data_ptr<X>();
  at::parallel_for(0, tokens, std::max<int64_t>(1, kGrain / features), [&](int64_t t, int64_t to) {
    for (; t < to; ++t) {
      const int64_t g = bucket[t];
      if (g >= 0 && g < adapters)
        row_of(features, rows.at(t), scale.at(g), bias.at(g), y + t * features);
      else
        std::copy_n(rows.at(t), features, y + t * features);
    }
  });
  return out;
}

// Sums of rows, of one block of features, chunk by chunk.
template <class A>
class Sums {
 public:
  template <class X>
  void add(int64_t n, const X* dy, const X* x) {
    if (x)
      for (int64_t i = 0; i < n; ++i) chunk_[i] += A(dy[i]) * A(x[i]);
    else
      for (int64_t i = 0; i < n; ++i) chunk_[i] += A(dy[i]);
    if (++rows_ == kChunk) flush();
  }
  void finish(int64_t n, A* out) {
    flush();
    std::copy_n(total_, n, out);
  }

 private:
  void flush() {
    for (int64_t i = 0; i < kBlock; ++i) total_[i] += std::exchange(chunk_[i], A(0));
    rows_ = 0;
  }
  A chunk_[kBlock] = {}, total_[kBlock] = {};
  int64_t rows_ = 0;
};

template <class X, class P>
struct Backward {
  using A = at::opmath_type<X>;

  const Rows<X> dy, x;
  const Rows<P> scales;
  const int32_t* perm;
  const int64_t features, adapters;
  X* dx;
  A *dscales, *dbiases;

  void block(int64_t g, int64_t from, int64_t to, int64_t begin) const {
    const int64_t n = std::min(kBlock, features - begin);
    const bool is_null = g == adapters;
    Sums<A> of_scales, of_biases;
    for (; from < to; ++from) {
      const int64_t t = perm[from];
      const X* d = dy.at(t) + begin;
      if (dx && is_null) std::copy_n(d, n, dx + t * features + begin);
      if (is_null) continue;
      if (dx) row_of<X, P>(n, d, scales.at(g) + begin, nullptr, dx + t * features + begin);
      if (dscales) of_scales.add(n, d, x.at(t) + begin);
      if (dbiases) of_biases.add(n, d, static_cast<const X*>(nullptr));
    }
    if (is_null) return;
    if (dscales) of_scales.finish(n, dscales + g * features + begin);
    if (dbiases) of_biases.finish(n, dbiases + g * features + begin);
  }
};

template <class T>
T* pointer(OptionalTensor& t) {
  return t ? t->mutable_data_ptr<T>() : nullptr;
}

template <class X, class P>
MultiElementwiseGradients backward(const at::Tensor& dy, const OptionalTensor& x,
                                   const OptionalTensor& scales, const int32_t* perm,
                                   const at::Tensor& indptr, bool need_dx, bool need_dscales,
                                   bool need_dbiases) {
  using A = at::opmath_type<X>;
  const int64_t tokens = dy.size(0), features = dy.size(1), adapters = indptr.size(0) - 2;
  OptionalTensor dx, dscales, dbiases;
  const auto wide = dy.options().dtype(c10::CppTypeToScalarType<A>::value);
  if (need_dx) dx = empty_rows(tokens, features, dy.options());
  if (need_dscales) dscales = at::zeros({adapters, features}, wide);
  if (need_dbiases) dbiases = at::zeros({adapters, features}, wide);
  const Backward<X, P> run{Rows<X>(dy),        Rows<X>(x), Rows<P>(scales), perm,
                           features,           adapters,   pointer<X>(dx),  pointer<A>(dscales),
                           pointer<A>(dbiases)};
  const int32_t* bounds = indptr.const_data_ptr<int32_t>();
  std::vector<int64_t> there; // adapters that have rows; rows without one only pass their gradient
  for (int64_t g = 0; g < adapters + (need_dx ? 1 : 0); ++g)
    if (bounds[g] < bounds[g + 1]) there.push_back(g);
  const int64_t blocks = (features + kBlock - 1) / kBlock, tasks = blocks * int64_t(there.size());
  const int64_t size = tasks ? std::max<int64_t>(1, tokens * features / tasks) : 1;
  at::parallel_for(0, tasks, std::max<int64_t>(1, kGrain / size), [&](int64_t k, int64_t to) {
    for (; k < to; ++k) {
      const int64_t g = there[k / blocks];
      run.block(g, bounds[g], bounds[g + 1], k % blocks * kBlock);
    }
  });
  return {std::move(dx), std::move(dscales), std::move(dbiases)};
}

// Calls body with the types of x and of the parameters, which are in the same or in the wide one.
template <class Body>
auto with_types(const at::Tensor& x, const OptionalTensor& parameter, const Body& body) {
  return AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kBFloat16, at::kHalf, x.scalar_type(), "multi_elementwise", [&] {
        using A = at::opmath_type<scalar_t>;
        const bool same = !parameter || parameter->scalar_type() == x.scalar_type();
        return same ? body(scalar_t(), scalar_t()) : body(scalar_t(), A());
      });
}

} // namespace

at::Tensor multi_elementwise_fwd(const at::Tensor& x, const OptionalTensor& scales,
                                 const OptionalTensor& biases, const at::Tensor& bucket) {
  check_memory("x", x);
  check_memory("scales", scales);
  check_memory("biases", biases);
  return with_types(x, scales ? scales : biases, [&](auto a, auto b) {
    return forward<decltype(a), decltype(b)>(x, scales, biases, bucket.const_data_ptr<int32_t>());
  });
}

MultiElementwiseGradients multi_elementwise_bwd(const at::Tensor& dy, const OptionalTensor& x,
                                                const OptionalTensor& scales,
                                                const at::Tensor& perm, const at::Tensor& indptr,
                                                bool need_dx, bool need_dscales,
                                                bool need_dbiases) {
  check_memory("dy", dy);
  check_memory("x", x);
  check_memory("scales", scales);
  return with_types(dy, scales, [&](auto a, auto b) {
    return backward<decltype(a), decltype(b)>(dy, x, scales, perm.const_data_ptr<int32_t>(), indptr,
                                              need_dx, need_dscales, need_dbiases);
  });
}

} // namespace pelt_fast
