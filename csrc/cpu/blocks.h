// What passes over rows share: blocks of rows for threads and caches, sums over rows in a fixed
// order, memory for tiles.
#pragma once

#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>

#include "../check.h"
#include "engine.h"
#include "memory.h"

namespace pelt_fast {

template <class T>
const T* data(const at::Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

// Rows in chunks of one thread each, chunks in blocks.
struct Plan {
  // products below which waking other threads costs more than they bring
  static constexpr int64_t kAlone = int64_t(1) << 20;

  int64_t rows, threads, most, unit, block, blocks, chunks;

  // few: rows that are worth a block of their own
  Plan(int64_t rows, int64_t products, int64_t most, int64_t unit, int64_t few = 64)
      : rows(rows), threads(products < kAlone ? 1 : at::get_num_threads()), most(most), unit(unit) {
    // as many blocks for every thread; small inputs get smaller blocks before threads go idle
    const int64_t wanted = round_up(std::max<int64_t>(1, (rows + most - 1) / most),
                                    std::min(threads, std::max<int64_t>(1, rows / few)));
    block = round_up((rows + wanted - 1) / wanted, unit);
    blocks = (rows + block - 1) / block;
    chunks = std::min(threads, blocks);
  }

  // body(chunk, is it the chunk's first block, begin row, end row), the blocks of a chunk in order
  // in one thread. Rows are dealt out to the chunks first, to within a unit: whole blocks would
  // leave a thread waiting for another's last one (540 and 484 rows, of 1024 in blocks of 90).
  template <class Body>
  void run(const Body& body) const {
    const int64_t units = (rows + unit - 1) / unit;
    const auto first_of = [&](int64_t chunk) {
      return std::min(rows, units * chunk / chunks * unit);
    };
    at::parallel_for(0, chunks, 1, [&](int64_t from, int64_t to) {
      for (int64_t chunk = from; chunk < to; ++chunk) {
        const int64_t first = first_of(chunk), last = first_of(chunk + 1);
        const int64_t pieces = (last - first + most - 1) / most;
        const int64_t size = round_up((last - first + pieces - 1) / pieces, unit);
        for (int64_t begin = first; begin < last; begin += size)
          body(chunk, begin == first, begin, std::min(last, begin + size));
      }
    });
  }
};

// A reduction over rows: c (r, n) += p (rows, r)ᵀ · q (rows, n), one partial sum per chunk of rows.
template <class A>
struct Reduction {
  int64_t r = 0, n = 0, ld = 0;
  at::Tensor partials; // (chunks, r · ld)

  Reduction() = default;
  // rows must not fall into the same cache sets, as rows a power of two apart do
  Reduction(int64_t chunks, int64_t r, int64_t n) : r(r), n(n), ld(round_up(n, 64) + 16) {
    partials =
        empty_rows(chunks, r * ld, at::TensorOptions().dtype(at::CppTypeToScalarType<A>::value));
  }
  A* of(int64_t chunk) const {
    return static_cast<A*>(partials.mutable_data_ptr()) + chunk * r * ld;
  }
  void start(int64_t chunk) const { std::fill_n(of(chunk), r * ld, A(0)); }

  // The partials added in order into the first one.
  const A* total() const {
    A* first = of(0);
    at::parallel_for(0, r * ld, 16384, [&](int64_t begin, int64_t end) {
      for (int64_t c = 1; c < partials.size(0); ++c) {
        const A* other = of(c);
        for (int64_t i = begin; i < end; ++i) first[i] += other[i];
      }
    });
    return first;
  }
};

// What one thread needs for its tiles.
struct Workspace {
  Scratch left, masked, random, right, product, delta, shrunk, transposed;
};

inline Workspace& workspace() {
  static thread_local Workspace workspace;
  return workspace;
}

// Rows [offset, offset + r) of a sum (rows, n) with rows ld apart, times scale, in the parameter's
// dtype.
template <class A>
at::Tensor gradient(const A* sum, int64_t ld, int64_t offset, int64_t r, int64_t n, double scale,
                    bool transpose, at::ScalarType dtype) {
  at::Tensor view = at::from_blob(const_cast<A*>(sum) + offset * ld, {r, n}, {ld, 1},
                                  at::TensorOptions().dtype(at::CppTypeToScalarType<A>::value));
  if (transpose) view = view.t();
  if (scale != 1.0) view = view.mul(scale);
  at::Tensor out = at::empty(view.sizes(), view.options().dtype(dtype));
  out.copy_(view);
  return out;
}

inline Mask make_mask(double p, const OptionalTensor& seed, size_t index, int64_t features) {
  Mask mask;
  if (p > 0 && seed) {
    mask.seed = uint64_t(*seed->const_data_ptr<int64_t>());
    mask.stream = uint32_t(index);
    mask.features = features;
    mask.none_kept = p >= 1;
    // nearbyint rounds ties to even, as Python's round does
    mask.threshold = uint32_t(std::min(std::nearbyint(p * 4294967296.0), 4294967295.0));
  }
  return mask;
}

inline double keep_scale(const Mask& mask, double p) {
  return !mask ? 1.0 : p >= 1 ? 0.0 : 1.0 / (1.0 - p);
}

} // namespace pelt_fast
