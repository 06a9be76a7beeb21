// How tiles are multiplied: with our own kernels on operands widened to the accumulator's type, or,
// for bf16 on AMX, with torch's brgemm on bf16 operands. The two engines have the same members, so
// that an operation is written once.
#pragma once

#include <ATen/native/CPUBlas.h>
#include <c10/util/bit_cast.h>

#include <cstdlib>
#include <memory>

#include "isa.h"
#include "kernels.h"

namespace pelt_fast {

// Memory for the tiles of one thread: 64-byte aligned, kept between calls.
class Scratch {
 public:
  template <class U>
  U* get(int64_t count) {
    const size_t bytes = (size_t(count) * sizeof(U) + 63) / 64 * 64;
    if (bytes > size_) {
      memory_.reset(static_cast<char*>(std::aligned_alloc(64, bytes)));
      if (!memory_) throw std::bad_alloc();
      size_ = bytes;
    }
    return reinterpret_cast<U*>(memory_.get());
  }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  std::unique_ptr<char, Free> memory_;
  size_t size_ = 0;
};

// Which elements of a (T, features) input one adapter's dropout keeps; see pelt_fast/random.py.
struct Mask {
  uint64_t seed = 0;
  uint32_t stream = 0, threshold = 0;
  int64_t features = 0;
  bool none_kept = false; // p = 1

  explicit operator bool() const { return features > 0; }

  // The random bits of elements (row, column .. column + n - 1), to be compared with the threshold.
  template <class T>
  const uint32_t* words(const Kernels<T>& kernels, int64_t row, int64_t column, int64_t n,
                        Scratch& scratch) const {
    uint32_t* words = scratch.get<uint32_t>(n + 16);
    if (none_kept)
      std::fill_n(words, n + 16, 0u); // below every threshold
    else
      kernels.philox(seed, stream, uint64_t(row) * uint64_t(features) + uint64_t(column), n, words);
    return words;
  }
};

// Rows in no order of memory's are nothing that hardware could foresee: whoever goes through them
// asks for those that come next.
template <class P>
void ask_for(const P* p, int64_t n) {
  for (int64_t i = 0; i < n; i += int64_t(64 / sizeof(P))) __builtin_prefetch(p + i);
}

template <class U>
struct Tile {
  const U* data;
  int64_t stride;
};

constexpr int64_t round_up(int64_t n, int64_t unit) {
  return (n + unit - 1) / unit * unit;
}

// Our own kernels. Operand: what a tile of x becomes before it is multiplied.
template <class T_>
struct WideEngine {
  using T = T_;
  using A = Acc<T>;
  using Operand = A;
  // a left tile of 96 × 384 and a product tile of 96 × 768 share a level-2 cache; a strip of W
  // stays in level 1
  static constexpr int64_t kBlockRows = 96, kBlockK = 384, kBlockColumns = 768, kRowUnit = 6;
  // of a tile of whole rows; more rows than fit level 2 are still better than few, which would read
  // the matrices and add up their gradients more often
  static constexpr int64_t kTileBytes = 1600 << 10;

  const Kernels<T>& kernels;
  int64_t lanes() const { return kernels.lanes; }     // unit of a padded rank
  int64_t strip() const { return 2 * kernels.lanes; } // columns of a packed strip of W

  // Left operand of a product over k: rows of x (dropped where the mask says), k padded to the pair
  // with zeros. order: which rows of x, one after the other without it.
  Tile<Operand> left(int64_t m, int64_t k, const T* x, int64_t stride, const Mask& mask,
                     int64_t row, int64_t column, Scratch& out, Scratch& random,
                     const int32_t* order = nullptr) const {
    const int64_t padded = round_up(k, 2 * lanes()),
                  ld = padded + 16; // rows must not fall into the same cache sets
    A* tile = out.get<A>(m * ld);
    for (int64_t i = 0; i < m; ++i) {
      const uint32_t* words = mask ? mask.words(kernels, row + i, column, k, random) : nullptr;
      if (order && i + 2 < m) ask_for(x + order[i + 2] * stride, k);
      kernels.widen(k, padded, x + (order ? order[i] : i) * stride, words, mask.threshold,
                    tile + i * ld);
    }
    return {tile, ld};
  }

  // Right operand of a product over rows: the same thing here, so a left tile is used again.
  static constexpr bool kLeftIsRight = true;
  Tile<Operand> right(int64_t m, int64_t n, const T* x, int64_t stride, const Mask& mask,
                      int64_t row, int64_t column, Scratch& out, Scratch& random) const {
    return left(m, n, x, stride, mask, row, column, out, random);
  }

  // The same from a tile that is wide already; its columns from k to the next pair are zero.
  Tile<Operand> left_of(int64_t m, int64_t k, Tile<A> tile, Scratch& out) const { return tile; }
  Tile<Operand> right_of(int64_t m, int64_t n, Tile<A> tile, Scratch& out) const { return tile; }

  // next: the packed b that is multiplied after this one; without it, what follows in memory
  void gemm(int64_t m, int64_t n, int64_t k, Tile<Operand> a, const T* b, int64_t ldb, A* c,
            int64_t ldc, bool accumulate, const T* next = nullptr) const {
    kernels.gemm(m, n, k, a.data, a.stride, b, ldb, c, ldc, accumulate, next ? next : b + k * ldb);
  }

  // c (r, n) += p (r, m) · q (m, n)
  void outer(int64_t r, int64_t n, int64_t m, const Operand* p, int64_t ldp, Tile<Operand> q, A* c,
             int64_t ldc) const {
    kernels.gemm_wide(r, round_up(n, lanes()), m, p, ldp, q.data, q.stride, c, ldc, true);
  }

  void operand(int64_t n, const T* values, Operand* out) const {
    kernels.widen(n, n, values, nullptr, 0, out);
  }
  void operand_of(int64_t n, const A* values, Operand* out) const { std::copy_n(values, n, out); }
  void finish() const {}
};

// bf16 on AMX tiles.
struct AmxEngine {
  using T = BF16;
  using A = float;
  using Operand = BF16;
  // 64 × 64 × 256 products run out of L1; 256 rows share each 32 KiB piece of W
  static constexpr int64_t kBlockRows = 256, kBlockK = 256, kBlockColumns = 256, kRowUnit = 32,
                           kTileRows = 64, kTileBytes = 1024 << 10;

  const Kernels<BF16>& kernels;
  const bool emulated; // plain products instead of brgemm's
  int64_t lanes() const { return 16; }
  int64_t strip() const { return 64; }

  Tile<Operand> left(int64_t m, int64_t k, const T* x, int64_t stride, const Mask& mask,
                     int64_t row, int64_t column, Scratch& out, Scratch& random,
                     const int32_t* order = nullptr) const {
    // rows that overlap (expanded, unfolded) are copied: brgemm need not take a stride below k
    if (!mask && !order && k % 2 == 0 && stride >= k) return {x, stride};
    const int64_t padded = round_up(k, 2), ld = padded + 32;
    BF16* tile = out.get<BF16>(m * ld);
    for (int64_t i = 0; i < m; ++i) {
      const uint32_t* words =
          mask ? mask.words(kernels, row + i, column, k, random) : random.get<uint32_t>(k);
      kernels.drop(k, padded, x + (order ? order[i] : i) * stride, words, mask ? mask.threshold : 0,
                   tile + i * ld);
    }
    return {tile, ld};
  }

  // Pairs of rows interleaved, as brgemm wants its right operand; an odd last row is paired with
  // zeros.
  static constexpr bool kLeftIsRight = false;
  Tile<Operand> right(int64_t m, int64_t n, const T* x, int64_t stride, const Mask& mask,
                      int64_t row, int64_t column, Scratch& out, Scratch& random) const {
    const int64_t ld = round_up(n, 16), pairs = (m + 1) / 2;
    BF16* tile = out.get<BF16>(pairs * 2 * ld + 2 * ld);
    BF16* dropped = tile + pairs * 2 * ld; // two rows
    for (int64_t i = 0; i < m; i += 2) {
      const BF16* rows[2] = {x + i * stride, i + 1 < m ? x + (i + 1) * stride : nullptr};
      for (int64_t j = 0; mask && j < 2 && rows[j]; ++j) {
        kernels.drop(n, n, rows[j], mask.words(kernels, row + i + j, column, n, random),
                     mask.threshold, dropped + j * ld);
        rows[j] = dropped + j * ld;
      }
      BF16* pair = tile + i * ld;
      kernels.interleave(n, rows[0], rows[1], pair);
      std::fill(pair + 2 * n, pair + 2 * round_up(n, 16), BF16{0});
    }
    return {tile, ld};
  }

  Tile<Operand> left_of(int64_t m, int64_t k, Tile<A> tile, Scratch& out) const {
    const int64_t padded = round_up(k, 2), ld = padded + 32;
    BF16* rows = out.get<BF16>(m * ld);
    for (int64_t i = 0; i < m; ++i)
      kernels.narrow(padded, tile.data + i * tile.stride, nullptr, rows + i * ld);
    return {rows, ld};
  }
  Tile<Operand> right_of(int64_t m, int64_t n, Tile<A> tile, Scratch& out) const {
    const int64_t ld = round_up(n, 16), pairs = (m + 1) / 2;
    BF16* pairs_of_rows = out.get<BF16>(pairs * 2 * ld + 2 * ld);
    BF16* rounded = pairs_of_rows + pairs * 2 * ld; // two rows
    for (int64_t i = 0; i < m; i += 2) {
      const int64_t count = std::min<int64_t>(2, m - i);
      for (int64_t j = 0; j < count; ++j)
        kernels.narrow(n, tile.data + (i + j) * tile.stride, nullptr, rounded + j * ld);
      BF16* pair = pairs_of_rows + i * ld;
      kernels.interleave(n, rounded, count == 2 ? rounded + ld : nullptr, pair);
      std::fill(pair + 2 * n, pair + 2 * ld, BF16{0});
    }
    return {pairs_of_rows, ld};
  }

  void gemm(int64_t m, int64_t n, int64_t k, Tile<Operand> a, const T* b, int64_t ldb, A* c,
            int64_t ldc, bool accumulate, const T* = nullptr) const {
    for (int64_t i = 0; i < m; i += kTileRows)
      brgemm(std::min(kTileRows, m - i), n, k, a.data + i * a.stride, a.stride, b, ldb, c + i * ldc,
             ldc, accumulate);
  }

  void outer(int64_t r, int64_t n, int64_t m, const Operand* p, int64_t ldp, Tile<Operand> q, A* c,
             int64_t ldc) const {
    for (int64_t j = 0; j < n; j += 64)
      gemm(r, std::min<int64_t>(64, round_up(n - j, 16)), round_up(m, 2), {p, ldp}, q.data + 2 * j,
           q.stride, c + j, ldc, true);
  }

  void operand(int64_t n, const T* values, Operand* out) const { std::copy_n(values, n, out); }
  void operand_of(int64_t n, const A* values, Operand* out) const {
    kernels.narrow(n, values, nullptr, out);
  }
  void finish() const {
    if (!emulated) at::native::cpublas::brgemm_release();
  }

 private:
  void brgemm(int64_t m, int64_t n, int64_t k, const BF16* a, int64_t lda, const BF16* b,
              int64_t ldb, float* c, int64_t ldc, bool accumulate) const {
    if (emulated) return plain(m, n, k, a, lda, b, ldb, c, ldc, accumulate);
    at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, accumulate,
                                reinterpret_cast<const at::BFloat16*>(a),
                                reinterpret_cast<const at::BFloat16*>(b), c, true);
  }

  static void plain(int64_t m, int64_t n, int64_t k, const BF16* a, int64_t lda, const BF16* b,
                    int64_t ldb, float* c, int64_t ldc, bool accumulate) {
    auto wide = [](BF16 v) { return c10::bit_cast<float>(uint32_t(v.bits) << 16); };
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < n; ++j) {
        float sum = accumulate ? c[i * ldc + j] : 0.0f;
        for (int64_t p = 0; p < k; ++p)
          sum += wide(a[i * lda + p]) * wide(b[p / 2 * 2 * ldb + 2 * j + p % 2]);
        c[i * ldc + j] = sum;
      }
  }
};

template <class T>
const Kernels<T>& current_kernels() {
#if defined(__x86_64__) && defined(__GNUC__)
  switch (current_isa()) {
    case Isa::kAvx2:
      return kernels_avx2<T>();
    case Isa::kAvx512:
    case Isa::kAmx:
      return kernels_avx512<T>();
    default:
      break;
  }
#endif
  return kernels_default<T>();
}

// Calls body(engine) with the engine for a dtype on the current instruction set.
template <class Body>
void with_engine(at::ScalarType dtype, const Body& body) {
  switch (dtype) {
    case at::kFloat:
      return body(WideEngine<float>{current_kernels<float>()});
    case at::kDouble:
      return body(WideEngine<double>{current_kernels<double>()});
    case at::kHalf:
      return body(WideEngine<F16>{current_kernels<F16>()});
    case at::kBFloat16:
      if (current_isa() >= Isa::kAmx)
        return body(AmxEngine{current_kernels<BF16>(), current_isa() == Isa::kAmxEmulated});
      return body(WideEngine<BF16>{current_kernels<BF16>()});
    default:
      TORCH_CHECK_TYPE(false, "x has dtype ", dtype,
                       "; expected float32, bfloat16, float16 or float64");
  }
}

} // namespace pelt_fast
