// The inner kernels, written once with the compiler's vector types and built once for every
// instruction set: the including file sets PELT_ISA (a name), PELT_BYTES (vector width) and the
// target, then includes this. No library header may come in here: an inline function built for a
// higher set must not leak into the rest.
#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace pelt_fast::PELT_ISA {
namespace {

#define PELT_INLINE inline __attribute__((always_inline))
#define PELT_INLINE_LAMBDA __attribute__((always_inline))

template <class A>
struct Vec;
template <>
struct Vec<float> {
  static constexpr int N = PELT_BYTES / 4;
  typedef float type __attribute__((vector_size(PELT_BYTES)));
};
template <>
struct Vec<double> {
  static constexpr int N = PELT_BYTES / 8;
  typedef double type __attribute__((vector_size(PELT_BYTES)));
};
constexpr int L = Vec<float>::N;
typedef float VF __attribute__((vector_size(PELT_BYTES)));
typedef uint32_t VU __attribute__((vector_size(PELT_BYTES)));
typedef uint16_t VH __attribute__((vector_size(PELT_BYTES / 2)));

template <class V, class P>
PELT_INLINE V load(const P* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}
template <class V, class P>
PELT_INLINE void store(P* p, V v) {
  std::memcpy(p, &v, sizeof(V));
}
template <class To, class From>
PELT_INLINE To bit_cast(From v) {
  static_assert(sizeof(To) == sizeof(From));
  To out;
  std::memcpy(&out, &v, sizeof(To));
  return out;
}

// ---- one element ----

PELT_INLINE float widen_one(float v) {
  return v;
}
PELT_INLINE double widen_one(double v) {
  return v;
}
PELT_INLINE float widen_one(BF16 v) {
  return bit_cast<float>(uint32_t(v.bits) << 16);
}
PELT_INLINE float widen_one(F16 v) {
  uint32_t sign = uint32_t(v.bits & 0x8000) << 16, rest = uint32_t(v.bits & 0x7fff) << 13;
  if (rest >= 0x0f800000u) return bit_cast<float>(sign | rest | 0x7f800000u); // inf, nan
  return bit_cast<float>(bit_cast<uint32_t>(bit_cast<float>(rest) * 0x1p112f) |
                         sign); // rebias; subnormals come out right
}

PELT_INLINE void narrow_one(float v, float& out) {
  out = v;
}
PELT_INLINE void narrow_one(double v, double& out) {
  out = v;
}
PELT_INLINE void narrow_one(float v, BF16& out) {
  uint32_t u = bit_cast<uint32_t>(v);
  out.bits = v != v ? uint16_t((u >> 16) | 0x40) : uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
PELT_INLINE void narrow_one(float v, F16& out) {
  uint32_t u = bit_cast<uint32_t>(v), sign = (u >> 16) & 0x8000, rest = u & 0x7fffffff;
  if (rest > 0x7f800000u) {
    out.bits = uint16_t(sign | 0x7e00); // nan
  } else if (rest >= 0x477ff000u) {
    out.bits = uint16_t(sign | 0x7c00); // 65520 and more: inf
  } else if (rest < 0x38800000u) {
    // subnormal: the addition rounds to the nearest multiple of 2^-24, ties to even
    float shifted = bit_cast<float>(rest) + 0.5f;
    out.bits = uint16_t(sign | (bit_cast<uint32_t>(shifted) - 0x3f000000u));
  } else {
    out.bits = uint16_t(sign | ((rest - 0x38000000u + 0xfff + ((rest >> 13) & 1)) >> 13));
  }
}

// ---- one vector ----

PELT_INLINE VF widen_vec(const float* p) {
  return load<VF>(p);
}
PELT_INLINE Vec<double>::type widen_vec(const double* p) {
  return load<Vec<double>::type>(p);
}
PELT_INLINE VF widen_vec(const BF16* p) {
  return bit_cast<VF>(__builtin_convertvector(load<VH>(p), VU) << 16);
}
PELT_INLINE VF widen_vec(const F16* p) {
#if defined(PELT_X86) && PELT_BYTES == 32
  return _mm256_cvtph_ps(load<__m128i>(p));
#elif defined(PELT_X86) && PELT_BYTES == 64
  return _mm512_cvtph_ps(load<__m256i>(p));
#else
  VF v;
  for (int i = 0; i < L; ++i) v[i] = widen_one(p[i]);
  return v;
#endif
}

PELT_INLINE void narrow_vec(VF v, float* p) {
  store(p, v);
}
PELT_INLINE void narrow_vec(Vec<double>::type v, double* p) {
  store(p, v);
}
PELT_INLINE void narrow_vec(VF v, BF16* p) {
  VU u = bit_cast<VU>(v);
  VU rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16, quiet = (u >> 16) | 0x40;
  VU is_nan = VU(v != v);
  store(p, __builtin_convertvector((rounded & ~is_nan) | (quiet & is_nan), VH));
}
PELT_INLINE void narrow_vec(VF v, F16* p) {
#if defined(PELT_X86) && PELT_BYTES == 32
  store(p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(PELT_X86) && PELT_BYTES == 64
  store(p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < L; ++i) narrow_one(v[i], p[i]);
#endif
}

// ---- products ----

// With few rows b is read at the speed of memory, and one stream of it is too little for the
// hardware to run ahead: 1 KiB ahead measured best of 0.5 to 4, 1.6 times the bytes per second of
// no prefetch.
constexpr int kFewRows = 4;
template <int bytes, class P>
PELT_INLINE void prefetch(const P* p) {
#pragma GCC unroll 8
  for (int line = 0; line < bytes; line += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(p) + 1024 + line);
}

// What the next product reads, a little of it for each kPiece of k: memory is read while this one
// runs.
constexpr int64_t kPiece = 16;
struct Ahead {
  const char* from;
  int64_t lines; // for each piece

  PELT_INLINE void fetch() {
    for (int64_t line = 0; line < lines; ++line) __builtin_prefetch(from + 64 * line);
    from += 64 * lines;
  }
};

// Columns [0, NV · N) of MR rows; the accumulators start at zero and stay in registers over all of
// k.
template <class T, int MR, int NV>
PELT_INLINE void micro(int64_t k, const Acc<T>* a, int64_t lda, const T* b, int64_t ldb, Acc<T>* c,
                       int64_t ldc, bool accumulate, Ahead ahead) {
  using A = Acc<T>;
  using V = typename Vec<A>::type;
  constexpr int N = Vec<A>::N;
  V acc[MR][NV];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[i][v] = V{};
  const auto step = [&](int64_t p) PELT_INLINE_LAMBDA {
    const T* row = b + p * ldb;
    if constexpr (MR <= kFewRows) prefetch<kPair<T> * NV * N * sizeof(T)>(row);
#pragma GCC unroll 2
    for (int of = 0; of < kPair<T>; ++of) { // the pair
      V values[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        if constexpr (kPair<T> == 1)
          values[v] = widen_vec(row + v * N);
        else
          values[v] = bit_cast<V>(of ? load<VU>(row + 2 * v * N) & 0xffff0000u
                                     : load<VU>(row + 2 * v * N) << 16);
      }
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) acc[i][v] += a[i * lda + p + of] * values[v];
    }
  };
  int64_t p = 0;
  for (; p + kPiece <= k; p += kPiece) {
    if constexpr (MR > kFewRows) ahead.fetch();
#pragma GCC unroll 4
    for (int64_t q = 0; q < kPiece; q += kPair<T>) step(p + q);
  }
  for (; p < k; p += kPair<T>) step(p);
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      A* to = c + i * ldc + v * N;
      store(to, accumulate ? load<V>(to) + acc[i][v] : acc[i][v]);
    }
}

// Terms in one run of additions. The error of a sum grows with the length of its runs, and where
// the result keeps all of the accumulator's bits that is what one sees: runs of 128 err less than
// the library's blocked sums do.
template <class T>
constexpr int64_t kRun = sizeof(T) == sizeof(Acc<T>) ? 128 : int64_t(1) << 62;

template <class T, int NV, int MR>
void rows(int64_t m, int64_t k, const Acc<T>* a, int64_t lda, const T* b, int64_t ldb, Acc<T>* c,
          int64_t ldc, bool accumulate, Ahead& ahead) {
  for (; m >= MR; m -= MR, a += MR * lda, c += MR * ldc) {
    micro<T, MR, NV>(k, a, lda, b, ldb, c, ldc, accumulate, ahead);
    ahead.from += 64 * ahead.lines * (k / kPiece);
  }
  if constexpr (MR > 1) {
    if (m > 0)
      rows<T, NV,
           (MR > 8   ? 8
            : MR > 4 ? 4
                     : MR / 2)>(m, k, a, lda, b, ldb, c, ldc, accumulate, ahead);
  }
}

// One run after the other, all rows in each: the piece of b that they share stays in level 1.
// next: what is multiplied after this, or null where b is not read from end to end.
template <class T, int NV, int MR>
void runs(int64_t m, int64_t k, const Acc<T>* a, int64_t lda, const T* b, int64_t ldb, Acc<T>* c,
          int64_t ldc, bool accumulate, const T* next) {
  for (int64_t p = 0; p < k; p += kRun<T>) {
    const int64_t count = k - p < kRun<T> ? k - p : kRun<T>;
    const T* then = p + count < k ? b + (p + count) * ldb : next;
    const int64_t pieces = (count + kPiece - 1) / kPiece * ((m + MR - 1) / MR),
                  lines = count * ldb * int64_t(sizeof(T)) / 64;
    Ahead ahead{reinterpret_cast<const char*>(then), next ? (lines + pieces - 1) / pieces : 0};
    rows<T, NV, MR>(m, count, a + p, lda, b + p * ldb, ldb, c, ldc, accumulate || p > 0, ahead);
  }
}

template <class T>
void gemm(int64_t m, int64_t n, int64_t k, const Acc<T>* a, int64_t lda, const T* b, int64_t ldb,
          Acc<T>* c, int64_t ldc, bool accumulate, const T* next) {
  constexpr int N = Vec<Acc<T>>::N;
  // two vectors wide, with rows to fill the registers: 16 of them, or 32 where vectors are 64 bytes
  constexpr int wide_rows = PELT_BYTES == 64 ? 12 : 6, narrow_rows = PELT_BYTES == 64 ? 16 : 12;
  for (; n >= 2 * N; n -= 2 * N, b += 2 * N * kPair<T>, c += 2 * N)
    runs<T, 2, wide_rows>(m, k, a, lda, b, ldb, c, ldc, accumulate, next);
  if (n > 0) runs<T, 1, narrow_rows>(m, k, a, lda, b, ldb, c, ldc, accumulate, next);
}

template <class A>
void gemm_wide(int64_t m, int64_t n, int64_t k, const A* a, int64_t lda, const A* b, int64_t ldb,
               A* c, int64_t ldc, bool accumulate) {
  gemm<A>(m, n, k, a, lda, b, ldb, c, ldc, accumulate, nullptr);
}

#if defined(__clang__) || __GNUC__ >= 12
#define PELT_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PELT_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, decltype(a == b){__VA_ARGS__})
#endif

// a0 b0 a1 b1 ... of the first (high = 0) or second halves
template <int high, class V>
PELT_INLINE V interleave_halves(V a, V b) {
  constexpr int N = sizeof(V) / sizeof(a[0]);
  if constexpr (N == 2) {
    return PELT_SHUFFLE(a, b, high, 2 + high);
  } else if constexpr (N == 4) {
    constexpr int h = 2 * high;
    return PELT_SHUFFLE(a, b, h, 4 + h, h + 1, 5 + h);
  } else if constexpr (N == 8) {
    constexpr int h = 4 * high;
    return PELT_SHUFFLE(a, b, h, 8 + h, h + 1, 9 + h, h + 2, 10 + h, h + 3, 11 + h);
  } else {
    constexpr int h = 8 * high;
    return PELT_SHUFFLE(a, b, h, 16 + h, h + 1, 17 + h, h + 2, 18 + h, h + 3, 19 + h, h + 4, 20 + h,
                        h + 5, 21 + h, h + 6, 22 + h, h + 7, 23 + h);
  }
}

// MR rows of a times NR rows of b, over k: both lie along k. The lanes of a sum are added at the
// end.
template <class A, int MR, int NR>
PELT_INLINE void micro_dots(int64_t k, const A* a, int64_t lda, const A* b, int64_t ldb, A* c,
                            int64_t ldc, bool accumulate) {
  static_assert(NR == 1 || NR == 4);
  using V = typename Vec<A>::type;
  constexpr int N = Vec<A>::N;
  V acc[MR][NR];
#pragma GCC unroll 4
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NR; ++j) acc[i][j] = V{};
  int64_t p = 0;
  for (; p + N <= k; p += N) {
    V row[NR];
#pragma GCC unroll 4
    for (int j = 0; j < NR; ++j) row[j] = load<V>(b + j * ldb + p);
#pragma GCC unroll 4
    for (int i = 0; i < MR; ++i) {
      const V value = load<V>(a + i * lda + p);
#pragma GCC unroll 4
      for (int j = 0; j < NR; ++j) acc[i][j] += value * row[j];
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < MR; ++i) {
    A lanes[N], sums[4];
    if constexpr (NR == 4 && N >= 4) {
      // two vectors into one, twice: the four sums in lanes 0, 2, 1, 3 of every four
      const V first =
          interleave_halves<0>(acc[i][0], acc[i][1]) + interleave_halves<1>(acc[i][0], acc[i][1]);
      const V second =
          interleave_halves<0>(acc[i][2], acc[i][3]) + interleave_halves<1>(acc[i][2], acc[i][3]);
      store(lanes, interleave_halves<0>(first, second) + interleave_halves<1>(first, second));
      for (int half = N / 2; half >= 4; half /= 2)
        for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
      sums[0] = lanes[0], sums[1] = lanes[2], sums[2] = lanes[1], sums[3] = lanes[3];
    } else {
      for (int j = 0; j < NR; ++j) {
        store(lanes, acc[i][j]);
        for (int half = N / 2; half; half /= 2)
          for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
        sums[j] = lanes[0];
      }
    }
    for (int j = 0; j < NR; ++j) {
      for (int64_t q = p; q < k; ++q) sums[j] += a[i * lda + q] * b[j * ldb + q];
      c[i * ldc + j] = accumulate ? c[i * ldc + j] + sums[j] : sums[j];
    }
  }
}

template <class A>
void dots(int64_t m, int64_t n, int64_t k, const A* a, int64_t lda, const A* b, int64_t ldb, A* c,
          int64_t ldc, bool accumulate) {
  for (; n >= 4; n -= 4, b += 4 * ldb, c += 4) {
    int64_t i = 0;
    for (; i + 2 <= m; i += 2)
      micro_dots<A, 2, 4>(k, a + i * lda, lda, b, ldb, c + i * ldc, ldc, accumulate);
    if (i < m) micro_dots<A, 1, 4>(k, a + i * lda, lda, b, ldb, c + i * ldc, ldc, accumulate);
  }
  for (; n > 0; --n, b += ldb, ++c)
    for (int64_t i = 0; i < m; ++i)
      micro_dots<A, 1, 1>(k, a + i * lda, lda, b, ldb, c + i * ldc, ldc, accumulate);
}

// out (columns, rows) = in (rows, columns)ᵀ, in squares of a vector's width: a square is turned by
// as many perfect shuffles of its rows as the width has bits.
template <class A>
void transpose(int64_t rows, int64_t columns, const A* in, int64_t ld_in, A* out, int64_t ld_out) {
  using V = typename Vec<A>::type;
  constexpr int N = Vec<A>::N;
  const int64_t whole_rows = rows / N * N, whole_columns = columns / N * N;
  for (int64_t i = 0; i < whole_rows; i += N)
    for (int64_t j = 0; j < whole_columns; j += N) {
      V square[N], next[N];
#pragma GCC unroll 16
      for (int v = 0; v < N; ++v) square[v] = load<V>(in + (i + v) * ld_in + j);
#pragma GCC unroll 4
      for (int bit = 1; bit < N; bit *= 2) {
#pragma GCC unroll 8
        for (int v = 0; v < N / 2; ++v) {
          next[2 * v] = interleave_halves<0>(square[v], square[v + N / 2]);
          next[2 * v + 1] = interleave_halves<1>(square[v], square[v + N / 2]);
        }
#pragma GCC unroll 16
        for (int v = 0; v < N; ++v) square[v] = next[v];
      }
#pragma GCC unroll 16
      for (int v = 0; v < N; ++v) store(out + (j + v) * ld_out + i, square[v]);
    }
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = i < whole_rows ? whole_columns : 0; j < columns; ++j)
      out[j * ld_out + i] = in[i * ld_in + j];
}

// ---- elementwise ----

PELT_INLINE VU keep_mask(const uint32_t* words, uint32_t threshold) {
  return VU(load<VU>(words) >= threshold);
}

template <class T>
void widen(int64_t n, int64_t n_padded, const T* x, const uint32_t* words, uint32_t threshold,
           Acc<T>* out) {
  using A = Acc<T>;
  constexpr int N = Vec<A>::N;
  int64_t i = 0;
  if (!words) {
    for (; i + N <= n; i += N) store(out + i, widen_vec(x + i));
    for (; i < n; ++i) out[i] = widen_one(x[i]);
  } else {
    if constexpr (sizeof(A) == 4) {
      for (; i + N <= n; i += N)
        store(out + i, bit_cast<VU>(widen_vec(x + i)) & keep_mask(words + i, threshold));
    }
    for (; i < n; ++i) out[i] = words[i] >= threshold ? widen_one(x[i]) : A(0);
  }
  for (; i < n_padded; ++i) out[i] = A(0);
}

template <class T>
void drop(int64_t n, int64_t n_padded, const T* x, const uint32_t* words, uint32_t threshold,
          T* out) {
  int64_t i = 0;
  for (; i < n; ++i) out[i] = words[i] >= threshold ? x[i] : T{};
  for (; i < n_padded; ++i) out[i] = T{};
}

template <class T>
void interleave(int64_t n, const T* even, const T* odd, T* out) {
  for (int64_t i = 0; i < n; ++i) {
    out[2 * i] = even[i];
    out[2 * i + 1] = odd ? odd[i] : T{};
  }
}

template <class T>
void narrow(int64_t n, const Acc<T>* c, const Acc<T>* bias, T* y) {
  using V = typename Vec<Acc<T>>::type;
  constexpr int N = Vec<Acc<T>>::N;
  int64_t i = 0;
  if (bias) {
    for (; i + N <= n; i += N) narrow_vec(load<V>(c + i) + load<V>(bias + i), y + i);
    for (; i < n; ++i) narrow_one(c[i] + bias[i], y[i]);
  } else {
    for (; i + N <= n; i += N) narrow_vec(load<V>(c + i), y + i);
    for (; i < n; ++i) narrow_one(c[i], y[i]);
  }
}

template <class A>
void add_masked(int64_t n, const A* delta, A scale, const uint32_t* words, uint32_t threshold,
                A* c) {
  int64_t i = 0;
  if constexpr (sizeof(A) == 4) {
    for (; i + L <= n; i += L) {
      VF added =
          bit_cast<VF>(bit_cast<VU>(load<VF>(delta + i) * scale) & keep_mask(words + i, threshold));
      store(c + i, load<VF>(c + i) + added);
    }
  }
  for (; i < n; ++i)
    if (words[i] >= threshold) c[i] += scale * delta[i];
}

// ---- Philox4x32-10 ----

typedef uint64_t VL __attribute__((vector_size(PELT_BYTES)));

// The product of the low 32 bits of each lane with a 32-bit constant.
PELT_INLINE VL mul_low(VL v, VL constant) {
#if defined(PELT_X86) && PELT_BYTES == 32
  return bit_cast<VL>(_mm256_mul_epu32(bit_cast<__m256i>(v), bit_cast<__m256i>(constant)));
#elif defined(PELT_X86) && PELT_BYTES == 64
  return bit_cast<VL>(_mm512_mul_epu32(bit_cast<__m512i>(v), bit_cast<__m512i>(constant)));
#else
  return (v & 0xffffffffu) * constant;
#endif
}

void philox(uint64_t seed, uint32_t stream, uint64_t first, int64_t n, uint32_t* words) {
  // One counter per 64-bit lane, its words in the low halves; what is in the high halves never gets
  // back into them.
  constexpr int Q = PELT_BYTES / 8, G = 2; // G independent groups hide the latency of the products
  const VL round_a = VL{} + 0xD2511F53u, round_b = VL{} + 0xCD9E8D57u;
  uint64_t block[2 * Q * G], low[Q * G], high[Q * G];
  VL lane;
  for (int i = 0; i < Q; ++i) lane[i] = uint64_t(i);
  uint64_t counter = first / 4;
  int64_t skip = int64_t(first % 4);
  for (; n > 0; counter += Q * G) {
    VL c0[G], c1[G], c2[G], c3[G];
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
      c0[g] = lane + (counter + uint64_t(g * Q));
      c1[g] = c0[g] >> 32;
      c2[g] = VL{} + stream;
      c3[g] = VL{};
    }
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; ++round) {
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        VL p0 = mul_low(c0[g], round_a), p1 = mul_low(c2[g], round_b);
        c0[g] = (p1 >> 32) ^ c1[g] ^ (VL{} + k0);
        c2[g] = (p0 >> 32) ^ c3[g] ^ (VL{} + k1);
        c1[g] = p1;
        c3[g] = p0;
      }
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
      store(low + g * Q, (c0[g] & 0xffffffffu) | (c1[g] << 32));
      store(high + g * Q, (c2[g] & 0xffffffffu) | (c3[g] << 32));
    }
    for (int i = 0; i < Q * G; ++i) { // little-endian: words 0, 1 and then 2, 3 of a counter
      block[2 * i] = low[i];
      block[2 * i + 1] = high[i];
    }
    int64_t count = 4 * Q * G - skip < n ? 4 * Q * G - skip : n;
    std::memcpy(words, reinterpret_cast<const uint32_t*>(block) + skip, size_t(count) * 4);
    words += count;
    n -= count;
    skip = 0;
  }
}

// clang-format off: the order is the point
#include "rows_impl.h"
#include "gates_impl.h"
// clang-format on

template <class T>
constexpr Kernels<T> table(const char* name) {
  using A = Acc<T>;
  return {name,          Vec<A>::N, gemm<T>,        gemm_wide<A>,   dots<A>,
          transpose<A>,  widen<T>,  drop<T>,        interleave<T>,  narrow<T>,
          add_masked<A>, philox,    row_table<T>(), gate_table<A>()};
}

} // namespace
} // namespace pelt_fast::PELT_ISA

#define PELT_DEFINE_KERNELS(getter, isa)                       \
  namespace pelt_fast {                                        \
  template <class T>                                           \
  const Kernels<T>& getter() {                                 \
    static constexpr Kernels<T> kernels = isa::table<T>(#isa); \
    return kernels;                                            \
  }                                                            \
  template const Kernels<float>& getter<float>();              \
  template const Kernels<double>& getter<double>();            \
  template const Kernels<BF16>& getter<BF16>();                \
  template const Kernels<F16>& getter<F16>();                  \
  }
