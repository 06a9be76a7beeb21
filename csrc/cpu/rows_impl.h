// The kernels of rows.h, for the instruction set of the including file; after kernels_impl.h, in
// its namespace. No library header may come in here either: libm is reached through the compiler.

// ---- the vectors of a row, and what is left at its end ----

template <class A>
struct Many {
  static constexpr int N = Vec<A>::N;
  template <class P>
  PELT_INLINE static typename Vec<A>::type get(const P* p) {
    return widen_vec(p);
  }
  template <class P, class V>
  PELT_INLINE static void put(P* p, V v) {
    narrow_vec(v, p);
  }
};

template <class A>
struct One {
  template <class P>
  PELT_INLINE static A get(const P* p) {
    return widen_one(*p);
  }
  template <class P>
  PELT_INLINE static void put(P* p, A v) {
    narrow_one(v, *p);
  }
};

#define PELT_BODY(...) [&](auto lanes, int64_t i) __attribute__((always_inline)) { __VA_ARGS__ }

template <class A, class Body>
PELT_INLINE void each(int64_t n, const Body& body) {
  constexpr int N = Vec<A>::N;
  int64_t i = 0;
  for (; i + N <= n; i += N) body(Many<A>{}, i);
  for (; i < n; ++i) body(One<A>{}, i);
}

template <class V, class A>
PELT_INLINE A total(V v) {
  A sum = 0;
  for (int i = 0; i < Vec<A>::N; ++i) sum += v[i];
  return sum;
}

// Σ term(i), in as many independent sums as hide the latency of an addition.
template <class A, class Term>
PELT_INLINE A sum_of(int64_t n, const Term& term) {
  using V = typename Vec<A>::type;
  constexpr int N = Vec<A>::N, G = 4;
  V sums[G] = {};
  int64_t i = 0;
  for (; i + G * N <= n; i += G * N)
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) sums[g] += term(Many<A>{}, i + g * N);
  for (; i + N <= n; i += N) sums[0] += term(Many<A>{}, i);
  A sum = total<V, A>((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; i < n; ++i) sum += term(One<A>{}, i);
  return sum;
}

// Two sums at once: the first is returned.
template <class V>
struct Two {
  V first, second;
};

template <class A, class Term>
PELT_INLINE A sum_of_two(int64_t n, A* second, const Term& term) {
  using V = typename Vec<A>::type;
  constexpr int N = Vec<A>::N, G = 2;
  V firsts[G] = {}, seconds[G] = {};
  int64_t i = 0;
  for (; i + G * N <= n; i += G * N)
#pragma GCC unroll 2
    for (int g = 0; g < G; ++g) {
      const auto t = term(Many<A>{}, i + g * N);
      firsts[g] += t.first;
      seconds[g] += t.second;
    }
  A sum = total<V, A>(firsts[0] + firsts[1]);
  *second = total<V, A>(seconds[0] + seconds[1]);
  for (; i < n; ++i) {
    const auto t = term(One<A>{}, i);
    sum += t.first;
    *second += t.second;
  }
  return sum;
}

// ---- rows ----

template <class T, class A = Acc<T>>
void row_add(int64_t n, const T* x, A* sum) {
  each<A>(n, PELT_BODY(lanes.put(sum + i, lanes.get(sum + i) + lanes.get(x + i));));
}

template <class T, class A = Acc<T>>
void row_narrow_sum(int64_t n, const A* a, const A* b, T* out) {
  if (b)
    each<A>(n, PELT_BODY(lanes.put(out + i, lanes.get(a + i) + lanes.get(b + i));));
  else
    each<A>(n, PELT_BODY(lanes.put(out + i, lanes.get(a + i));));
}

// v wherever the words keep it, else 0
PELT_INLINE VF kept(VF v, const uint32_t* words, uint32_t threshold) {
  return bit_cast<VF>(bit_cast<VU>(v) & keep_mask(words, threshold));
}
PELT_INLINE Vec<double>::type kept(Vec<double>::type v, const uint32_t* words, uint32_t threshold) {
  for (int i = 0; i < Vec<double>::N; ++i) v[i] = words[i] >= threshold ? v[i] : 0;
  return v;
}
PELT_INLINE float kept(float v, const uint32_t* word, uint32_t threshold) {
  return *word >= threshold ? v : 0;
}
PELT_INLINE double kept(double v, const uint32_t* word, uint32_t threshold) {
  return *word >= threshold ? v : 0;
}

template <class T, class A = Acc<T>>
void row_combine(int64_t n, const A* bias, A factor, const A* scale, const uint32_t* words,
                 uint32_t threshold, const T* x, const T* skip, A* w) {
  each<A>(n, PELT_BODY({
            auto v = lanes.get(w + i);
            if (bias) v += lanes.get(bias + i);
            if (scale) v *= lanes.get(scale + i);
            v *= factor;
            if (words) v = kept(v, words + i, threshold);
            if (x) v += lanes.get(x + i);
            if (skip) v += lanes.get(skip + i);
            lanes.put(w + i, v);
          }));
}

template <class A>
void row_add_product(int64_t n, const A* a, const A* b, A factor, A* sum) {
  each<A>(n, PELT_BODY(lanes.put(
                 sum + i, lanes.get(sum + i) + lanes.get(a + i) * lanes.get(b + i) * factor);));
}

template <class A>
A row_dot(int64_t n, const A* a, const A* b) {
  return sum_of<A>(n, PELT_BODY(return lanes.get(a + i) * lanes.get(b + i);));
}

template <class A>
void row_moments(int64_t n, const A* x, A* mean, A* variance) {
  const A centre = sum_of<A>(n, PELT_BODY(return lanes.get(x + i);)) / A(n);
  *mean = centre;
  *variance =
      sum_of<A>(n, PELT_BODY(const auto v = lanes.get(x + i) - centre; return v * v;)) / A(n);
}

template <class O, class A>
void row_normalise(int64_t n, const A* x, A mean, A rstd, const A* weight, const A* bias, O* out) {
  if (bias)
    each<A>(n,
            PELT_BODY(lanes.put(out + i, (lanes.get(x + i) - mean) * rstd * lanes.get(weight + i) +
                                             lanes.get(bias + i));));
  else
    each<A>(n, PELT_BODY(
                   lanes.put(out + i, (lanes.get(x + i) - mean) * rstd * lanes.get(weight + i));));
}

template <class A>
void row_normalise_backward(int64_t n, const A* dy, A mean, A rstd, const A* weight, A* s,
                            A* dweight, A* dbias) {
  A along = 0;
  const A plain = sum_of_two<A>(n, &along, PELT_BODY({
                                  const auto normal = (lanes.get(s + i) - mean) * rstd;
                                  const auto g = lanes.get(dy + i);
                                  lanes.put(s + i, normal);
                                  if (dweight)
                                    lanes.put(dweight + i, lanes.get(dweight + i) + g * normal);
                                  if (dbias) lanes.put(dbias + i, lanes.get(dbias + i) + g);
                                  const auto through = g * lanes.get(weight + i);
                                  return Two<decltype(through)>{through, through * normal};
                                }));
  const A mean_plain = plain / A(n), mean_along = along / A(n);
  each<A>(n, PELT_BODY(lanes.put(s + i, (lanes.get(dy + i) * lanes.get(weight + i) - mean_plain -
                                         lanes.get(s + i) * mean_along) *
                                            rstd);));
  // of one feature nothing is left, and a contracted product would leave its rounding error
  if (n == 1) s[0] = A(0);
}

// ---- exponentials ----
// In fp32 polynomials, fitted to the relative error over the range that is left after reduction; in
// fp64 libm, element by element.

typedef double VD __attribute__((vector_size(PELT_BYTES)));

template <class V, class F>
PELT_INLINE V map(V v, const F& f) {
  for (int i = 0; i < int(sizeof(V) / sizeof(v[0])); ++i) v[i] = f(v[i]);
  return v;
}

template <int n>
PELT_INLINE VF polynomial(VF x, const float (&c)[n]) {
  VF y = VF{} + c[n - 1];
#pragma GCC unroll 16
  for (int i = n - 2; i >= 0; --i) y = y * x + c[i];
  return y;
}

PELT_INLINE VF absolute(VF v) {
  return bit_cast<VF>(bit_cast<VU>(v) & 0x7fffffffu);
}
PELT_INLINE VF with_sign_of(VF v, VF sign) {
  return bit_cast<VF>(bit_cast<VU>(v) | (bit_cast<VU>(sign) & 0x80000000u));
}

PELT_INLINE VD exponential(VD v) {
  return map(v, [](double x) __attribute__((always_inline)) { return __builtin_exp(x); });
}
PELT_INLINE VF exponential(VF v) {
  constexpr float c[] = {1.0f,          1.00000004f,   0.499999921f,  0.166664202f,
                         0.0416682258f, 0.0083748173f, 0.00138368396f};
  // beyond these the result is 0 or infinite; nan passes
  VF x = v > 88.8f ? VF{} + 88.8f : v;
  x = x < -87.3f ? VF{} - 87.3f : x;
  const VF shifted = x * 1.44269504f + 12582912.0f; // its low bits are the nearest integer
  const VF n = shifted - 12582912.0f;
  const VF r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  const VU bits = bit_cast<VU>(shifted) << 23;
  const VF power = bit_cast<VF>(bits + (127u << 23)); // infinite from n = 128 on
  const VF high = v > 88.37f ? VF{} + __builtin_inff() : polynomial(r, c) * power;
  return v < -87.3f ? VF{} : high;
}

PELT_INLINE VD hyperbolic_tangent(VD v) {
  return map(v, [](double x) __attribute__((always_inline)) { return __builtin_tanh(x); });
}
PELT_INLINE VF hyperbolic_tangent(VF v) {
  constexpr float c[] = {-0.333333292f, 0.133327946f, -0.0538540703f, 0.0210100829f,
                         -0.0061131928f};
  const VF x = absolute(v), square = v * v;
  const VF small = v + v * square * polynomial(square, c);
  const VF e = exponential(x * -2.0f);
  const VF large = with_sign_of((1.0f - e) / (1.0f + e), v);
  return x < 0.625f ? small : large; // nan takes the second, which it passes through
}

// 1 - erf(|v|)
PELT_INLINE VD upper_error(VD v) {
  return map(
      v, [](double x) __attribute__((always_inline)) { return __builtin_erfc(__builtin_fabs(x)); });
}
PELT_INLINE VF upper_error(VF v) {
  constexpr float low[] = {1.12837917f,    -0.376126385f,    0.112837827f,   -0.0268654458f,
                           0.00522107487f, -0.000848471138f, 0.00011270544f, -9.68013496e-06f};
  constexpr float high[] = {-0.000178983552f, 1.12953574f,    0.633304575f,     0.108326965f,
                            -0.0251499244f,   0.00418271288f, -0.000436880847f, 2.13053869e-05f};
  const VF x = absolute(v);
  const VF small = 1.0f - x * polynomial(x * x, low);
  const VF large = exponential(-polynomial(x > 12.0f ? VF{} + 12.0f : x, high));
  return x < 1.0f ? small : large;
}

// ---- softmax ----

template <class A>
A row_join_softmax(int64_t n, int64_t n_padded, A scale, A log_sum, A* scores) {
  using V = typename Vec<A>::type;
  constexpr int N = Vec<A>::N;
  for (int64_t i = 0; i < n_padded; i += N) store(scores + i, load<V>(scores + i) * scale);
  for (int64_t i = n; i < n_padded; ++i) scores[i] = -A(__builtin_inf());
  V largest = V{} + log_sum;
  for (int64_t i = 0; i < n_padded; i += N) {
    const V v = load<V>(scores + i);
    largest = v > largest ? v : largest;
  }
  A most = largest[0];
  for (int i = 1; i < N; ++i) most = largest[i] > most ? largest[i] : most;
  V sums{};
  for (int64_t i = 0; i < n_padded; i += N) {
    const V p = exponential(load<V>(scores + i) - most);
    sums += p;
    store(scores + i, p);
  }
  const A others = exponential(V{} + (log_sum - most))[0], sum = others + total<V, A>(sums);
  const A factor = A(1) / sum;
  for (int64_t i = 0; i < n_padded; i += N) store(scores + i, load<V>(scores + i) * factor);
  return others * factor;
}

// ---- activations ----

template <class A>
struct Act {
  using V = typename Vec<A>::type;
  static constexpr A kTanhScale = A(0.79788456080286536), kTanhCube = A(0.044715),
                     kQuick = A(1.702), kSlope = A(0.01), kDensity = A(0.39894228040143268);

  PELT_INLINE static V logistic(V q) { return A(1) / (A(1) + exponential(-q)); }

  // Φ, the distribution function of the normal distribution
  PELT_INLINE static V normal(V q) {
    const V tail = A(0.5) * upper_error(q * A(0.70710678118654752));
    return q < 0 ? tail : A(1) - tail;
  }

  // tanh(softplus(q)) = n / (n + 2) with n = e(e + 2), e = exp(q); 1 from q = 20 on
  PELT_INLINE static V mish_factor(V q) {
    const V e = exponential(q > A(20) ? V{} + A(20) : q), n = e * (e + A(2));
    return n / (n + A(2));
  }

  template <Activation kind>
  PELT_INLINE static V value(V q) {
    if constexpr (kind == Activation::kRelu) return q < 0 ? V{} : q; // nan stays
    if constexpr (kind == Activation::kGelu) return q * normal(q);
    if constexpr (kind == Activation::kGeluTanh)
      return q * A(0.5) * (A(1) + hyperbolic_tangent(kTanhScale * (q + kTanhCube * q * q * q)));
    if constexpr (kind == Activation::kSilu) return q * logistic(q);
    if constexpr (kind == Activation::kTanh) return hyperbolic_tangent(q);
    if constexpr (kind == Activation::kSigmoid) return logistic(q);
    if constexpr (kind == Activation::kLeakyRelu) return q < 0 ? q * kSlope : q;
    if constexpr (kind == Activation::kQuickGelu) return q * logistic(q * kQuick);
    if constexpr (kind == Activation::kRelu2) return q < 0 ? V{} : q * q;
    if constexpr (kind == Activation::kRelu6) {
      const V low = q < 0 ? V{} : q;
      return low > A(6) ? V{} + A(6) : low;
    }
    if constexpr (kind == Activation::kMish) return q * mish_factor(q);
    return q;
  }

  template <Activation kind>
  PELT_INLINE static V derivative(V q) {
    const V one = V{} + A(1), zero = V{};
    // not q > 0: torch takes the slope of nan to be one
    if constexpr (kind == Activation::kRelu) return q <= 0 ? zero : one;
    if constexpr (kind == Activation::kGelu)
      return normal(q) + q * (kDensity * exponential(q * q * A(-0.5)));
    if constexpr (kind == Activation::kGeluTanh) {
      const V t = hyperbolic_tangent(kTanhScale * (q + kTanhCube * q * q * q));
      const V inner = kTanhScale * (A(1) + A(3) * kTanhCube * q * q);
      return A(0.5) * (one + t) + A(0.5) * q * (one - t * t) * inner;
    }
    if constexpr (kind == Activation::kSilu) {
      const V s = logistic(q);
      return s * (one + q * (one - s));
    }
    if constexpr (kind == Activation::kTanh) {
      const V t = hyperbolic_tangent(q);
      return one - t * t;
    }
    if constexpr (kind == Activation::kSigmoid) {
      const V s = logistic(q);
      return s * (one - s);
    }
    if constexpr (kind == Activation::kLeakyRelu) return q > 0 ? one : V{} + kSlope;
    if constexpr (kind == Activation::kQuickGelu) {
      const V s = logistic(q * kQuick);
      return s * (one + kQuick * q * (one - s));
    }
    if constexpr (kind == Activation::kRelu2) return q <= 0 ? zero : q * A(2);
    if constexpr (kind == Activation::kRelu6) return q <= 0 ? zero : (q >= A(6) ? zero : one);
    if constexpr (kind == Activation::kMish) {
      const V t = mish_factor(q);
      return t + q * logistic(q) * (one - t * t);
    }
    return one;
  }

  static constexpr bool selects(Activation kind) {
    return kind == Activation::kRelu || kind == Activation::kRelu2 || kind == Activation::kRelu6;
  }

  template <Activation kind>
  static void forward(int64_t n, const A* q, A* out) {
    for (int64_t i = 0; i < n; i += Vec<A>::N) store(out + i, value<kind>(load<V>(q + i)));
  }
  template <Activation kind>
  static void backward(int64_t n, const A* q, A* da) {
    for (int64_t i = 0; i < n; i += Vec<A>::N) {
      const V slope = derivative<kind>(load<V>(q + i)), through = load<V>(da + i) * slope;
      // where torch selects instead of multiplying, nothing of an infinite da passes
      store(da + i, selects(kind) ? (slope == 0 ? V{} : through) : through);
    }
  }
};

#define PELT_EACH_ACTIVATION(run)         \
  switch (kind) {                         \
    case Activation::kRelu:               \
      return run(Activation::kRelu);      \
    case Activation::kGelu:               \
      return run(Activation::kGelu);      \
    case Activation::kGeluTanh:           \
      return run(Activation::kGeluTanh);  \
    case Activation::kSilu:               \
      return run(Activation::kSilu);      \
    case Activation::kTanh:               \
      return run(Activation::kTanh);      \
    case Activation::kSigmoid:            \
      return run(Activation::kSigmoid);   \
    case Activation::kLeakyRelu:          \
      return run(Activation::kLeakyRelu); \
    case Activation::kQuickGelu:          \
      return run(Activation::kQuickGelu); \
    case Activation::kRelu2:              \
      return run(Activation::kRelu2);     \
    case Activation::kRelu6:              \
      return run(Activation::kRelu6);     \
    case Activation::kMish:               \
      return run(Activation::kMish);      \
    case Activation::kLinear:             \
      return run(Activation::kLinear);    \
  }

template <class A>
void activate(Activation kind, int64_t n, const A* q, A* out) {
#define PELT_RUN(name) Act<A>::template forward<name>(n, q, out)
  PELT_EACH_ACTIVATION(PELT_RUN)
#undef PELT_RUN
}

template <class A>
void activate_backward(Activation kind, int64_t n, const A* q, A* da) {
#define PELT_RUN(name) Act<A>::template backward<name>(n, q, da)
  PELT_EACH_ACTIVATION(PELT_RUN)
#undef PELT_RUN
}

// ---- products of rows that lie anywhere ----

// Rows that lie anywhere are no stream that the hardware could foresee: memory is asked for the
// next ones while these are multiplied.
template <class P>
PELT_INLINE void ask_for(const P* p, int64_t n) {
  for (int64_t i = 0; i < n; i += int64_t(64 / sizeof(P))) __builtin_prefetch(p + i);
}

// A matrix in A, row-major.
template <class P>
struct Dense {
  static constexpr bool listed = false;
  P* data;
  int64_t ld;
  PELT_INLINE P* operator[](int64_t i) const { return data + i * ld; }
};

// Columns from `first` on of rows that are given by their addresses.
template <class P>
struct Listed {
  static constexpr bool listed = true;
  P* const* rows;
  int64_t first;
  PELT_INLINE P* operator[](int64_t i) const { return rows[i] + first; }
};

// Columns [0, NV · N) of MR rows, as micro() makes them. ask: for the columns of b after the next.
template <int MR, int NV, bool ask, class A, class Left, class Right, class Out>
PELT_INLINE void row_micro(int64_t k, int64_t row, Left a, int64_t p0, Right b, Out c,
                           bool accumulate) {
  using V = typename Vec<A>::type;
  constexpr int N = Vec<A>::N;
  const A* left[MR];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) left[i] = a[row + i] + p0;
  V acc[MR][NV];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[i][v] = V{};
#pragma GCC unroll 2
  for (int64_t p = 0; p < k; ++p) {
    const A* right = b[p0 + p];
    if constexpr (ask) __builtin_prefetch(right + 2 * NV * N);
    V value[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) value[v] = load<V>(right + v * N);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[i][v] += left[i][p] * value[v];
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      A* to = c[row + i] + v * N;
      store(to, accumulate ? load<V>(to) + acc[i][v] : acc[i][v]);
    }
}

// All of k for some rows before the next ones: rows are read along. first: a is new to the caches.
template <int MR, int NV, class A, class Left, class Right, class Out>
void row_strip(int64_t row, int64_t m, int64_t k, Left a, Right b, Out c, bool accumulate,
               bool first) {
  for (; m - row >= MR; row += MR)
    for (int64_t p = 0; p < k; p += kRun<A>) {
      const int64_t run = k - p < kRun<A> ? k - p : kRun<A>;
      if constexpr (Left::listed) {
        for (int64_t next = row + MR; first && next < m && next < row + 2 * MR; ++next)
          ask_for(a[next] + p, run);
      }
      if (Right::listed && row == 0)
        row_micro<MR, NV, true, A>(run, row, a, p, b, c, accumulate || p > 0);
      else
        row_micro<MR, NV, false, A>(run, row, a, p, b, c, accumulate || p > 0);
    }
  if constexpr (MR > 1) {
    if (row < m)
      row_strip<(MR > 8 ? 8 : MR > 4 ? 4 : MR / 2), NV, A>(row, m, k, a, b, c, accumulate, first);
  }
}

// b(j), c(j): from column j on.
template <class A, class Left, class Right, class Out>
void row_gemm(int64_t m, int64_t n, int64_t k, Left a, const Right& b, const Out& c, int64_t ahead,
              bool accumulate) {
  constexpr int N = Vec<A>::N;
  constexpr int wide_rows = PELT_BYTES == 64 ? 12 : 6, narrow_rows = PELT_BYTES == 64 ? 16 : 12;
  int64_t j = 0;
  for (; j + 2 * N <= n; j += 2 * N) {
    for (int64_t i = m; i < m + ahead; ++i) ask_for(c(j)[i], 2 * N);
    row_strip<wide_rows, 2, A>(0, m, k, a, b(j), c(j), accumulate, j == 0);
  }
  if (j < n) row_strip<narrow_rows, 1, A>(0, m, k, a, b(j), c(j), accumulate, j == 0);
}

template <class A>
void gemm_from(int64_t m, int64_t n, int64_t k, const A* const* rows, const A* b, int64_t ldb, A* c,
               int64_t ldc, bool accumulate) {
  row_gemm<A>(
      m, n, k, Listed<const A>{rows, 0}, [=](int64_t j) { return Dense<const A>{b + j, ldb}; },
      [=](int64_t j) { return Dense<A>{c + j, ldc}; }, 0, accumulate);
}

template <class A>
void gemm_into(int64_t m, int64_t n, int64_t k, const A* a, int64_t lda, const A* b, int64_t ldb,
               A* const* rows, int64_t ahead, bool accumulate) {
  row_gemm<A>(
      m, n, k, Dense<const A>{a, lda}, [=](int64_t j) { return Dense<const A>{b + j, ldb}; },
      [=](int64_t j) { return Listed<A>{rows, j}; }, ahead, accumulate);
}

template <class A>
void gemm_over(int64_t m, int64_t n, int64_t k, const A* a, int64_t lda, const A* const* rows, A* c,
               int64_t ldc, bool accumulate) {
  row_gemm<A>(
      m, n, k, Dense<const A>{a, lda}, [=](int64_t j) { return Listed<const A>{rows, j}; },
      [=](int64_t j) { return Dense<A>{c + j, ldc}; }, 0, accumulate);
}

template <class T>
constexpr RowKernels<T> row_table() {
  using A = Acc<T>;
  return {row_add<T>,          row_add<A, A>,
          row_narrow_sum<T>,   row_combine<T>,
          row_add_product<A>,  row_dot<A>,
          row_moments<A>,      row_normalise<T, A>,
          row_normalise<A, A>, row_normalise_backward<A>,
          activate<A>,         activate_backward<A>,
          row_join_softmax<A>, gemm_from<A>,
          gemm_into<A>,        gemm_over<A>};
}
