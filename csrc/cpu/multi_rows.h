// The rows of a batch by adapter, for operations in which every row has its own: segments and tiles
// that never hold two adapters, and products with an adapter's matrices where they lie.
//
// How a product is made depends on the adapter's own number of rows and on the shapes, on nothing
// else in the batch, and a sum over an adapter's rows runs in their order in one thread: so its
// results have the same bits alone and in any batch, with any number of threads.
#pragma once

#include <ATen/Functions.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <numeric>
#include <vector>

#include "blocks.h"
#include "engine.h"
#include "memory.h"

namespace pelt_fast::multi {

// A stack of matrices has as many elements of a block in level 2 as this.
constexpr int64_t kBlock = 32768, kColumns = 128, kChunk = 64;
// Rows of a result that are changed at once.
constexpr int64_t kBand = 12;
// Rows of an adapter from which on its A is turned to be multiplied: a sum's lanes need no adding
// up then.
constexpr int64_t kMany = 32;
// Columns of rows that are changed where they lie.
constexpr int64_t kWide = 1024;

// One matrix (rows, columns) of T or of the accumulator's type, any strides.
struct Matrix {
  const char* data;
  bool wide;
  int64_t row, column; // strides

  Matrix t() const { return {data, wide, column, row}; }
};

template <class T>
struct Stack {
  using A = Acc<T>;
  explicit Stack(const at::Tensor& t)
      : data(static_cast<const char*>(t.const_data_ptr())),
        wide(t.scalar_type() == at::CppTypeToScalarType<A>::value),
        each(t.stride(0) * t.itemsize()),
        row(t.stride(1)),
        column(t.stride(2)) {}
  Matrix operator[](int64_t g) const { return {data + g * each, wide, row, column}; }

  const char* data;
  bool wide;
  int64_t each, row, column;
};

struct Segment {
  int64_t adapter, begin, rows; // positions in the permutation; adapter -1: none
  int64_t all;                  // rows that the adapter has in the batch
};

// Rows to be added to, by their addresses.
template <class A>
struct OutRowsOf {
  std::array<A*, kChunk> rows;
  int64_t ahead = 0; // rows that are listed behind them and come next
  A* operator[](int64_t i) const { return rows[i]; }
};

template <class T>
struct Work {
  using OutRows = OutRowsOf<Acc<T>>;
  using A = Acc<T>;
  const Kernels<T>& kernels;
  Scratch& line;

  // out (rows, columns) = block of m that begins at (i0, j0), each row then zeros up to padded
  void load(const Matrix& m, int64_t i0, int64_t rows, int64_t j0, int64_t columns, int64_t padded,
            A* out, int64_t ld) const {
    for (int64_t i = 0; i < rows; ++i) {
      A* to = out + i * ld;
      const int64_t first = (i0 + i) * m.row + j0 * m.column;
      if (m.wide) {
        const A* from = reinterpret_cast<const A*>(m.data) + first;
        for (int64_t j = 0; j < columns; ++j) to[j] = from[j * m.column];
        std::fill(to + columns, to + padded, A(0));
      } else {
        const T* from = reinterpret_cast<const T*>(m.data) + first;
        if (m.column != 1) {
          T* dense = line.template get<T>(columns);
          for (int64_t j = 0; j < columns; ++j) dense[j] = from[j * m.column];
          from = dense;
        }
        kernels.widen(columns, padded, from, nullptr, 0, to);
      }
    }
  }

  // The block as it lies in memory where that serves, else a copy in A.
  const A* rows_of(const Matrix& m, int64_t i0, int64_t rows, int64_t j0, int64_t columns,
                   int64_t padded, Scratch& scratch, int64_t& ld) const {
    if (m.wide && m.column == 1 && padded == columns) {
      ld = m.row;
      return reinterpret_cast<const A*>(m.data) + i0 * m.row + j0;
    }
    ld = padded;
    A* out = scratch.template get<A>(rows * padded);
    load(m, i0, rows, j0, columns, padded, out, ld);
    return out;
  }

  // Block (n, k) of b, which lies along k, turned: (k, n padded to lanes).
  const A* turned(int64_t n, int64_t k, const A* b, int64_t ld, int64_t padded) const {
    A* out = workspace().delta.template get<A>(k * padded);
    for (int64_t p = 0; padded > n && p < k; ++p)
      std::fill(out + p * padded + n, out + (p + 1) * padded, A(0));
    kernels.transpose(n, k, b, ld, out, padded);
    return out;
  }

  // c (m, n padded to lanes) = or += rows (m, k) · block (k, n) of b that begins in row k0. A row's
  // sums do not depend on how many rows there are. many: enough of them to turn a block of b that
  // lies along k.
  void shrink(int64_t m, int64_t n, int64_t k, const A* const* rows, const Matrix& b, int64_t k0,
              A* c, int64_t ldc, bool accumulate, bool many) const {
    const int64_t padded = round_up(n, kernels.lanes);
    int64_t ld;
    if (b.column == 1 || b.row != 1) {
      const A* block = rows_of(b, k0, k, 0, n, padded, workspace().right, ld);
      return kernels.rows.gemm_from(m, padded, k, rows, block, ld, c, ldc, accumulate);
    }
    const A* block = rows_of(b.t(), 0, n, k0, k, k, workspace().right, ld);
    if (many || k < 8 * kernels.lanes) // shorter sums are not worth adding up their lanes
      return kernels.rows.gemm_from(m, padded, k, rows, turned(n, k, block, ld, padded), padded, c,
                                    ldc, accumulate);
    for (int64_t i = 0; i < m; i += 2) // any two rows lie evenly
      kernels.dots(std::min<int64_t>(2, m - i), n, k, rows[i],
                   i + 1 < m ? rows[i + 1] - rows[i] : 0, block, ld, c + i * ldc, ldc, accumulate);
  }

  // body(first row, rows, first column, columns) for the parts of m rows with n columns that
  // products with b are best added to: few rows and many columns of them, as they lie in memory;
  // or, where a piece of b has to be made ready first, all rows with it.
  template <class Body>
  void bands(int64_t m, const Matrix& b, int64_t n, const Body& body) const {
    const bool ready = b.column == 1 && b.wide;
    const int64_t band = ready ? kBand : m, piece = ready ? kWide : kColumns;
    for (int64_t row = 0; row < m; row += band)
      for (int64_t j = 0; j < n; j += piece)
        body(row, std::min(band, m - row), j, std::min(piece, n - j));
  }

  // rows (m, n padded to lanes) = or += a (m, k) · columns [n0, n0 + n) of b (k, ·)
  void expand(int64_t m, int64_t n, int64_t k, const A* a, int64_t lda, const Matrix& b, int64_t n0,
              const OutRows& rows, bool accumulate) const {
    const int64_t padded = round_up(n, kernels.lanes);
    int64_t ld;
    if (b.column != 1 && b.row == 1) {
      const A* block = rows_of(b.t(), n0, n, 0, k, k, workspace().right, ld);
      return kernels.rows.gemm_into(m, padded, k, a, lda, turned(n, k, block, ld, padded), padded,
                                    rows.rows.data(), rows.ahead, accumulate);
    }
    const A* block = rows_of(b, 0, k, n0, n, padded, workspace().right, ld);
    kernels.rows.gemm_into(m, padded, k, a, lda, block, ld, rows.rows.data(), rows.ahead,
                           accumulate);
  }
};

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

// Elements of a sum's piece of a stack: a block of it stays in level 2.
inline int64_t block_of(int64_t rank) {
  return std::clamp<int64_t>(kBlock / rank / 64 * 64, 128, 1024);
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
