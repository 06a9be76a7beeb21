// The order of a batch by adapter, rows of it, and gradients of stacks of matrices: for operations
// in which every row has its own adapter.
#pragma once

#include <ATen/Functions.h>

#include <cstring>

#include "multi_rows.h"

namespace pelt_fast::multi {

// Rows by adapter, as a plan has them.
struct Order {
  // our own: whoever writes over the plan meanwhile leads out of no tensor
  std::vector<int32_t> perm;
  std::vector<Segment> segments;

  Order(const at::Tensor& plan, const at::Tensor& boundaries, int64_t tokens, int64_t adapters)
      : perm(plan.const_data_ptr<int32_t>(),
             plan.const_data_ptr<int32_t>() + std::min(tokens, plan.numel())) {
    const int32_t* indptr = boundaries.const_data_ptr<int32_t>();
    int64_t end = 0;
    bool whole = int64_t(perm.size()) == tokens;
    for (int64_t g = 0; g <= adapters && whole; ++g) {
      const int64_t begin = end;
      end = indptr[g + 1];
      whole = begin <= end && end <= tokens;
      if (begin < end) segments.push_back({g < adapters ? g : -1, begin, end - begin, end - begin});
    }
    std::vector<bool> seen(tokens);
    for (int64_t t = 0; t < tokens && whole; ++t) {
      whole = perm[t] >= 0 && perm[t] < tokens && !seen[perm[t]];
      if (whole) seen[perm[t]] = true;
    }
    TORCH_CHECK_VALUE(whole && end == tokens, "plan does not hold each of x's ", tokens,
                      " rows once: it was changed since it was checked");
  }
};

// body(task) of tasks in order; each thread has about the same sum of costs.
template <class Task, class Body>
void share(const std::vector<Task>& tasks, const std::vector<int64_t>& costs, int64_t threads,
           const Body& body) {
  const int64_t total = std::accumulate(costs.begin(), costs.end(), int64_t(0));
  std::vector<size_t> first{0}; // of each thread
  int64_t sum = 0;
  for (size_t i = 0; i < tasks.size(); ++i) {
    // where the middle of a task lies says whose it is
    while (int64_t(first.size()) < threads &&
           (2 * sum + costs[i]) * threads >= 2 * total * int64_t(first.size()))
      first.push_back(i);
    sum += costs[i];
  }
  first.resize(size_t(threads) + 1, tasks.size());
  at::parallel_for(0, threads, 1, [&](int64_t from, int64_t to) {
    for (size_t i = first[size_t(from)]; i < first[size_t(to)]; ++i) body(tasks[i]);
  });
}

template <class A>
using ListedRows = std::array<const A*, kChunk>;

// Columns [k0, k0 + kc) of a tile's rows of x in A, then zeros up to padded, through a mask (null:
// none): where they lie in memory if that serves, else copies. again: each is read several times.
template <class T>
ListedRows<Acc<T>> rows_in(const Kernels<T>& kernels, const std::vector<int32_t>& perm,
                           const Segment& tile, const T* x, int64_t stride, int64_t k0, int64_t kc,
                           int64_t padded, const Mask* mask, bool again, Scratch& scratch) {
  using A = Acc<T>;
  ListedRows<A> rows;
  if constexpr (std::is_same_v<T, A>) {
    // many rows that fall into the same cache sets are better copied
    const bool spread = !again || tile.rows <= 8 || stride * int64_t(sizeof(A)) % 4096 != 0;
    if (!mask && padded == kc && spread) {
      for (int64_t r = 0; r < tile.rows; ++r) rows[r] = x + perm[tile.begin + r] * stride + k0;
      return rows;
    }
  }
  A* out = scratch.template get<A>(tile.rows * padded);
  for (int64_t r = 0; r < tile.rows; ++r) {
    const int64_t t = perm[tile.begin + r];
    if (r + 2 < tile.rows) ask_for(x + perm[tile.begin + r + 2] * stride + k0, kc);
    const uint32_t* words = mask ? mask->words(kernels, t, k0, kc, workspace().random) : nullptr;
    kernels.widen(kc, padded, x + t * stride + k0, words, words ? mask->threshold : 0,
                  out + r * padded);
    rows[r] = out + r * padded;
  }
  return rows;
}

// A gradient of a stack (L, p, q), in the stack's strides where an adapter's part is dense in them;
// zeros but for the adapters whose parts are written as a whole.
inline at::Tensor gradient_of(const at::Tensor& stack, const std::vector<bool>& written) {
  const int64_t adapters = stack.size(0), p = stack.size(1), q = stack.size(2);
  const bool turned = stack.stride(1) == 1 && stack.stride(2) == p && p > 1;
  at::Tensor out = empty_rows(adapters, p * q, stack.options());
  const int64_t bytes = p * q * stack.itemsize();
  char* memory = static_cast<char*>(out.mutable_data_ptr());
  for (int64_t g = 0; g < adapters; ++g)
    if (!written[g]) std::memset(memory + g * bytes, 0, bytes);
  return turned ? out.as_strided(stack.sizes(), {p * q, 1, p}) : out.view(stack.sizes());
}

// In the order of the parameter's memory, as autograd keeps a gradient without a copy of it.
inline at::Tensor like(const at::Tensor& gradient, const at::Tensor& parameter) {
  if (gradient.strides() == parameter.strides()) return gradient;
  at::Tensor out = at::empty_like(parameter); // where it is dense in no order: in some order
  return gradient.strides() == out.strides() ? gradient : out.copy_(gradient);
}

} // namespace pelt_fast::multi
