// The rows of a batch by adapter, for operations in which every row has its own: segments and tiles
// that never hold two adapters, and products with an adapter's matrices where they lie.
//
// How a product is made depends on the adapter's own number of rows and on the shapes, on nothing
// else in the batch, and a sum over an adapter's rows runs in their order in one thread: so its
// results have the same bits alone and in any batch, with any number of threads.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <numeric>
#include <vector>

#include "blocks.h"
#include "engine.h"
#include "memory.h"
#include "multi_lora.h"

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

template <class T>
struct Call {
  using A = Acc<T>;
  const MultiLoRA& call;
  const Kernels<T>& kernels;
  int64_t adapters, total = 0, padded = 0; // ΣR, and with each padded to lanes
  std::vector<Stack<T>> a, b;
  std::vector<int64_t> most, offset, padded_offset; // R of a projection, its first column
  std::vector<Mask> masks;
  A keep = 1;
  std::vector<int32_t>
      perm; // our own: whoever writes over the plan meanwhile leads out of no tensor
  const A* row_scale;
  std::vector<Segment> segments;

  Call(const MultiLoRA& call, const Kernels<T>& kernels, int64_t tokens, int64_t features)
      : call(call),
        kernels(kernels),
        adapters(call.lora_a[0].size(0)),
        perm(call.perm.const_data_ptr<int32_t>(),
             call.perm.const_data_ptr<int32_t>() + std::min(tokens, call.perm.numel())),
        row_scale(call.row_scale ? data<A>(*call.row_scale) : nullptr) {
    for (size_t i = 0; i < call.lora_a.size(); ++i) {
      a.emplace_back(call.lora_a[i]);
      b.emplace_back(call.lora_b[i]);
      most.push_back(call.lora_a[i].size(1));
      offset.push_back(total);
      padded_offset.push_back(padded);
      total += most.back();
      padded += round_up(most.back(), kernels.lanes);
      masks.push_back(make_mask(call.dropout_p, call.seed, i, features));
    }
    keep = A(keep_scale(masks[0], call.dropout_p));
    const int32_t* indptr = call.indptr.const_data_ptr<int32_t>();
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

  int64_t n() const { return int64_t(a.size()); }
  bool dropout() const { return bool(masks[0]); }
  int64_t rank(int64_t i, int64_t g) const {
    return std::clamp<int64_t>(call.ranks[i].const_data_ptr<int32_t>()[g], 0, most[i]);
  }
  // of an adapter or none
  int64_t rank_of(int64_t i, int64_t g) const { return g < 0 ? 0 : rank(i, g); }
  A scaling(int64_t i, int64_t g) const { return data<A>(call.scaling[i])[g]; }
  A factor(int64_t i, int64_t g, int64_t t) const {
    return row_scale ? scaling(i, g) * row_scale[t] : scaling(i, g);
  }

  // What a row of an adapter's costs, about.
  int64_t cost(int64_t g) const {
    int64_t sum = 8;
    for (int64_t i = 0; i < n(); ++i) sum += rank_of(i, g);
    return sum;
  }

  // body(task) of tasks in order; each thread has about the same sum of costs.
  template <class Task, class Body>
  static void share(const std::vector<Task>& tasks, const std::vector<int64_t>& costs,
                    int64_t threads, const Body& body) {
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

  // Positions at which rows are divided among threads: cost(adapter) is what a row of its costs.
  template <class Cost>
  std::vector<int64_t> divided(int64_t threads, int64_t unit, const Cost& cost) const {
    int64_t total = 0, before = 0;
    for (const Segment& s : segments) total += s.rows * cost(s.adapter);
    std::vector<int64_t> first{0};
    for (const Segment& s : segments) {
      const int64_t each = cost(s.adapter);
      for (int64_t wanted;
           int64_t(first.size()) < threads &&
           (wanted = total * int64_t(first.size()) / threads) <= before + s.rows * each;) {
        const int64_t at = (s.begin + (wanted - before) / each) / unit * unit;
        first.push_back(std::max(first.back(), at));
      }
      before += s.rows * each;
    }
    first.resize(size_t(threads) + 1, int64_t(perm.size()));
    return first;
  }

  // body(part) of each segment, or its part, of at most a chunk, among rows [begin, end)
  template <class Body>
  void parts(int64_t begin, int64_t end, const Body& body) const {
    auto s = std::upper_bound(segments.begin(), segments.end(), begin,
                              [](int64_t row, const Segment& s) { return row < s.begin; });
    for (--s; s != segments.end() && s->begin < end; ++s) {
      const int64_t last = std::min(end, s->begin + s->rows);
      for (int64_t row = std::max(begin, s->begin); row < last; row += kChunk)
        body(Segment{s->adapter, row, std::min(kChunk, last - row), s->all});
    }
  }

  // body(tile), tiles in any order and thread
  template <class Body>
  void tiles(int64_t tokens, int64_t products, const Body& body) const {
    const int64_t threads = products < Plan::kAlone ? 1 : at::get_num_threads();
    const int64_t size =
        std::clamp<int64_t>(round_up((tokens + threads - 1) / threads, 8), 8, kChunk);
    std::vector<Segment> tiles;
    std::vector<int64_t> costs;
    for (const Segment& s : segments)
      for (int64_t r = 0; r < s.rows; r += size) {
        tiles.push_back({s.adapter, s.begin + r, std::min(size, s.rows - r), s.all});
        costs.push_back(tiles.back().rows * cost(s.adapter));
      }
    share(tiles, costs, threads, body);
  }

  // Tasks (segment, projection, columns) of a sum over rows.
  template <class Body>
  void sums(const std::vector<int64_t>& widths, const Body& body) const {
    struct Task {
      const Segment* segment;
      int64_t projection, begin, columns;
    };
    std::vector<Task> tasks;
    std::vector<int64_t> costs;
    // wide ones read what is shared fewer times, if there is one for everybody
    const int64_t threads = at::get_num_threads(),
                  width = int64_t(segments.size()) < 4 * threads ? 256 : 1024;
    for (const Segment& s : segments)
      for (int64_t i = 0; s.adapter >= 0 && i < n(); ++i)
        for (int64_t c = 0; rank(i, s.adapter) > 0 && c < widths[i]; c += width) {
          tasks.push_back({&s, i, c, std::min(width, widths[i] - c)});
          // what is written costs too
          costs.push_back((s.rows + 8) * rank(i, s.adapter) * tasks.back().columns);
        }
    share(tasks, costs, threads, [&](const Task& task) {
      body(*task.segment, task.projection, task.begin, task.columns);
    });
  }

  using Rows = std::array<const A*, kChunk>;
  using OutRows = OutRowsOf<A>;

  // Columns [k0, k0 + kc) of the tile's rows of x in A, then zeros up to padded, through projection
  // i's mask (i < 0: none): where they lie in memory if that serves, else copies. again: each is
  // read several times.
  Rows rows_in(const Segment& tile, const T* x, int64_t stride, int64_t k0, int64_t kc,
               int64_t padded, int64_t i, bool again, Scratch& scratch) const {
    Rows rows;
    const bool masked = i >= 0 && masks[i];
    if constexpr (std::is_same_v<T, A>) {
      // many rows that fall into the same cache sets are better copied
      const bool spread = !again || tile.rows <= 8 || stride * int64_t(sizeof(A)) % 4096 != 0;
      if (!masked && padded == kc && spread) {
        for (int64_t r = 0; r < tile.rows; ++r) rows[r] = x + perm[tile.begin + r] * stride + k0;
        return rows;
      }
    }
    A* out = scratch.template get<A>(tile.rows * padded);
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t t = perm[tile.begin + r];
      if (r + 2 < tile.rows) ask_for(x + perm[tile.begin + r + 2] * stride + k0, kc);
      const uint32_t* words =
          masked ? masks[i].words(kernels, t, k0, kc, workspace().random) : nullptr;
      kernels.widen(kc, padded, x + t * stride + k0, words, words ? masks[i].threshold : 0,
                    out + r * padded);
      rows[r] = out + r * padded;
    }
    return rows;
  }

  // Columns [n0, n0 + nc) of rows of a result, to be added to: the band's own where they are whole
  // vectors of A, else room for a copy. The band is a part of the tile.
  OutRows rows_out(const Segment& tile, const Segment& band, T* y, int64_t stride, int64_t n0,
                   int64_t nc, Scratch& scratch) const {
    OutRows out;
    if constexpr (std::is_same_v<T, A>) {
      if (nc % kernels.lanes == 0) {
        out.ahead = std::min(band.rows, tile.begin + tile.rows - band.begin - band.rows);
        for (int64_t r = 0; r < band.rows + out.ahead; ++r)
          out.rows[r] = y + perm[band.begin + r] * stride + n0;
        return out;
      }
    }
    const int64_t ld = round_up(nc, kernels.lanes);
    A* memory = scratch.template get<A>(band.rows * ld);
    for (int64_t r = 0; r < band.rows; ++r) out.rows[r] = memory + r * ld;
    return out;
  }
  // Copies among them, rounded into the result.
  void store(const Segment& tile, const OutRows& rows, int64_t nc, T* y, int64_t stride,
             int64_t n0) const {
    for (int64_t r = 0; r < tile.rows; ++r) {
      T* to = y + perm[tile.begin + r] * stride + n0;
      if (!is_own(rows[r], to)) kernels.narrow(nc, rows[r], nullptr, to);
    }
  }
  static bool is_own(const A* row, const T* y) {
    return static_cast<const void*>(row) == static_cast<const void*>(y);
  }

  // (rank, rows), the tile's rows of s or ds turned: element (j, r) times factor(r)
  template <class Factor>
  A* turned(const Segment& tile, const T* s, int64_t column, int64_t rank, const Factor& factor,
            Scratch& scratch) const {
    A* out = scratch.template get<A>(rank * tile.rows);
    A* row = workspace().left.template get<A>(rank);
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t t = perm[tile.begin + r];
      const A* from = row;
      if constexpr (std::is_same_v<T, A>)
        from = s + t * total + column;
      else
        kernels.widen(rank, rank, s + t * total + column, nullptr, 0, row);
      const A f = factor(t);
      for (int64_t j = 0; j < rank; ++j) out[j * tile.rows + r] = from[j] * f;
    }
    return out;
  }
};

// Elements of a sum's piece of a stack: a block of it stays in level 2.
inline int64_t block_of(int64_t rank) {
  return std::clamp<int64_t>(kBlock / rank / 64 * 64, 128, 1024);
}

} // namespace pelt_fast::multi
