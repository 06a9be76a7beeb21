// The kernels of gates.h, for the instruction set of the including file; after rows_impl.h, in its
// namespace.

// (1 - u) / u of u = (word + 1/2) / 2³², in which nothing cancels: ~word = 2³² - 1 - word
PELT_INLINE VF odds_against(const uint32_t* words, VF) {
  const VU w = load<VU>(words);
  return (__builtin_convertvector(~w, VF) + 0.5f) / (__builtin_convertvector(w, VF) + 0.5f);
}
PELT_INLINE VD odds_against(const uint32_t* words, VD) {
  VD v;
  for (int i = 0; i < Vec<double>::N; ++i)
    v[i] = (double(~words[i]) + 0.5) / (double(words[i]) + 0.5);
  return v;
}

// Pointers that move along together; at the end what is left is copied into whole vectors.
template <class A>
struct Lane {
  static constexpr int N = Vec<A>::N;

  Lane(const A* from, int64_t i, int64_t n, A fill, A* room) : p(from ? from + i : nullptr) {
    if (!from || i + N <= n) return;
    for (int j = 0; j < N; ++j) room[j] = i + j < n ? from[i + j] : fill;
    p = room;
  }
  PELT_INLINE typename Vec<A>::type get() const { return load<typename Vec<A>::type>(p); }

  const A* p;
};

// out[i:i + N], of which there are n
template <class A, class V>
PELT_INLINE void put(A* out, int64_t i, int64_t n, V v) {
  if (!out) return;
  if (i + Vec<A>::N <= n) return store(out + i, v);
  for (int j = 0; i + j < n; ++j) out[i + j] = v[j];
}

template <class A>
struct Gate {
  using V = typename Vec<A>::type;
  static constexpr int N = Vec<A>::N;

  V sigmoid, stretched, open; // open: the probability that the gate is not zero

  PELT_INLINE Gate(V log_alpha, const uint32_t* words, const HardConcrete<A>& c) {
    const V one = V{} + A(1), against = exponential(-log_alpha);
    sigmoid = one / (one + (words ? against * odds_against(words, V{}) : against));
    stretched = sigmoid * c.width + c.lower;
    open = one / (one + against * c.ratio);
  }
  PELT_INLINE V value() const {
    const V low = stretched < 0 ? V{} : stretched; // nan stays
    return low > A(1) ? V{} + A(1) : low;
  }
  // d value / d log_alpha, to be multiplied with what is not infinite where it is 0
  PELT_INLINE V slope(const HardConcrete<A>& c) const {
    return sigmoid * (A(1) - sigmoid) * c.width;
  }
  PELT_INLINE V through(V g) const {
    const V low = stretched < 0 ? V{} : g;
    return stretched > A(1) ? V{} : low;
  }
};

// A vector's words, of which n - i are there
template <int N>
PELT_INLINE const uint32_t* words_at(const uint32_t* words, int64_t i, int64_t n, uint32_t* room) {
  if (!words || i + N <= n) return words ? words + i : nullptr;
  for (int j = 0; j < N; ++j) room[j] = i + j < n ? words[i + j] : 0u;
  return room;
}

template <class A>
A gate_diff(int64_t n, const A* weight, const A* diff, const A* log_alpha, const uint32_t* words,
            HardConcrete<A> c, A* out) {
  using V = typename Vec<A>::type;
  constexpr int N = Vec<A>::N;
  A room[3][N];
  uint32_t bits[N];
  V open{};
  for (int64_t i = 0; i < n; i += N) {
    // what is not there counts as closed for certain
    const Lane<A> w(weight, i, n, A(0), room[0]), d(diff, i, n, A(0), room[1]),
        a(log_alpha, i, n, -A(__builtin_inff()), room[2]);
    const Gate<A> gate(a.get(), words_at<N>(words, i, n, bits), c);
    open += gate.open;
    put(out, i, n, w.get() + gate.value() * d.get() * c.scale);
  }
  return total<V, A>(open);
}

template <class A>
A gate_diff_backward(int64_t n, const A* g, A gcount, const A* weight, const A* diff,
                     const A* log_alpha, const uint32_t* words, HardConcrete<A> c, A* out, A* ddiff,
                     A* dlog_alpha) {
  using V = typename Vec<A>::type;
  constexpr int N = Vec<A>::N;
  A room[4][N];
  uint32_t bits[N];
  V along{};
  for (int64_t i = 0; i < n; i += N) {
    const Lane<A> d(diff, i, n, A(0), room[0]), a(log_alpha, i, n, -A(__builtin_inff()), room[1]),
        h(g, i, n, A(0), room[2]);
    const Gate<A> gate(a.get(), words_at<N>(words, i, n, bits), c);
    const V value = gate.value();
    if (out) {
      const Lane<A> w(weight, i, n, A(0), room[3]);
      put(out, i, n, w.get() + value * d.get() * c.scale);
    }
    V dalpha = gcount * (gate.open * (A(1) - gate.open));
    if (g) {
      const V upstream = h.get(), product = upstream * d.get();
      along += product * value;
      put(ddiff, i, n, upstream * value * c.scale);
      dalpha += gate.through(product * c.scale) * gate.slope(c);
    } else {
      put(ddiff, i, n, V{});
    }
    put(dlog_alpha, i, n, dalpha);
  }
  return total<V, A>(along);
}

template <class A>
void gate_mask(int64_t n, const A* g, const A* weight, const A* scores, A threshold, A* out,
               A* dscores, A* dweight) {
  each<A>(n, PELT_BODY({
            const auto w = lanes.get(weight + i);
            const auto open = lanes.get(scores + i) >= threshold;
            if (out) lanes.put(out + i, open ? w : decltype(w){});
            if (!g) return;
            const auto upstream = lanes.get(g + i);
            if (dscores) lanes.put(dscores + i, upstream * w);
            if (dweight) lanes.put(dweight + i, open ? upstream : decltype(w){});
          }));
}

template <class A>
constexpr GateKernels<A> gate_table() {
  return {gate_diff<A>, gate_diff_backward<A>, gate_mask<A>};
}
