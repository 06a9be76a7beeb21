// A call of batched multi-LoRA, as tiles and sums over rows see it.
#pragma once

#include "multi_lora.h"
#include "multi_rows.h"

namespace pelt_fast::multi {

template <class T>
struct Call : Order {
  using A = Acc<T>;
  const MultiLoRA& call;
  const Kernels<T>& kernels;
  int64_t adapters, total = 0, padded = 0; // ΣR, and with each padded to lanes
  std::vector<Stack<T>> a, b;
  std::vector<int64_t> most, offset, padded_offset; // R of a projection, its first column
  std::vector<Mask> masks;
  A keep = 1;
  const A* row_scale;

  Call(const MultiLoRA& call, const Kernels<T>& kernels, int64_t tokens, int64_t features)
      : Order(call.perm, call.indptr, tokens, call.lora_a[0].size(0)),
        call(call),
        kernels(kernels),
        adapters(call.lora_a[0].size(0)),
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

  using OutRows = OutRowsOf<A>;

  // multi::rows_in, through projection i's mask (i < 0: none)
  ListedRows<A> rows_in(const Segment& tile, const T* x, int64_t stride, int64_t k0, int64_t kc,
                        int64_t padded, int64_t i, bool again, Scratch& scratch) const {
    const Mask* mask = i >= 0 && masks[i] ? &masks[i] : nullptr;
    return multi::rows_in(kernels, perm, tile, x, stride, k0, kc, padded, mask, again, scratch);
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

} // namespace pelt_fast::multi
