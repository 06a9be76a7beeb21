// Diff pruning and masking: one pass over the elements of a weight, forward and backward.
//
// Every element is read once and every result written once, in pieces that stay in level 1 while
// they are widened, computed on and rounded. Backward makes the weight again beside its gradients,
// so that none is kept between the passes. Sums go to one number per piece, added in order: they
// depend neither on timing nor on the number of threads.
#include "delta.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "blocks.h"
#include "engine.h"
#include "memory.h"

namespace pelt_fast {
namespace {

constexpr int64_t kPiece = 1024, kGrain = 16; // pieces that are worth another thread

at::Tensor empty_like_flat(const at::Tensor& like, at::ScalarType dtype) {
  return empty_rows(1, like.numel(), like.options().dtype(dtype)).view(like.sizes());
}

// Reads pieces of a tensor in A, and writes them.
template <class A>
class Pieces {
 public:
  explicit Pieces(const at::Tensor& t)
      : dtype_(t.scalar_type()), from_(t.const_data_ptr()), to_(nullptr) {}
  static Pieces maybe(const OptionalTensor& t) { return t ? Pieces(*t) : Pieces(); }
  static Pieces output(const OptionalTensor& t) {
    Pieces pieces = maybe(t);
    if (t) pieces.to_ = t->mutable_data_ptr();
    return pieces;
  }

  // n elements from begin on; in their own place where they are in A already
  const A* read(int64_t begin, int64_t n, A* room) const {
    if (!from_) return nullptr;
    switch (dtype_) {
      case at::kBFloat16:
        return widened<BF16>(begin, n, room);
      case at::kHalf:
        return widened<F16>(begin, n, room);
      default:
        return static_cast<const A*>(from_) + begin;
    }
  }
  // where to put them, and then that they are there
  A* start(int64_t begin, A* room) const {
    if (!to_) return nullptr;
    return dtype_ == at::CppTypeToScalarType<A>::value ? static_cast<A*>(to_) + begin : room;
  }
  void finish(int64_t begin, int64_t n, const A* room) const {
    if (!to_) return;
    if (dtype_ == at::kBFloat16) narrowed<BF16>(begin, n, room);
    if (dtype_ == at::kHalf) narrowed<F16>(begin, n, room);
  }

 private:
  Pieces() : dtype_(at::CppTypeToScalarType<A>::value), from_(nullptr), to_(nullptr) {}

  template <class T>
  const A* widened(int64_t begin, int64_t n, A* room) const {
    if constexpr (std::is_same_v<A, float>)
      current_kernels<T>().widen(n, n, static_cast<const T*>(from_) + begin, nullptr, 0, room);
    return room;
  }
  template <class T>
  void narrowed(int64_t begin, int64_t n, const A* room) const {
    if constexpr (std::is_same_v<A, float>)
      current_kernels<T>().narrow(n, room, nullptr, static_cast<T*>(to_) + begin);
  }

  at::ScalarType dtype_;
  const void* from_;
  void* to_;
};

// body(begin, n, room), room for eight pieces; the sum of what it returns
template <class A, class Body>
double each_piece(int64_t elements, const Body& body) {
  const int64_t pieces = (elements + kPiece - 1) / kPiece;
  std::vector<double> sums(pieces);
  at::parallel_for(0, pieces, kGrain, [&](int64_t from, int64_t to) {
    A* room = workspace().product.template get<A>(8 * kPiece);
    for (int64_t p = from; p < to; ++p)
      sums[p] = double(body(p * kPiece, std::min(kPiece, elements - p * kPiece), room));
  });
  return std::accumulate(sums.begin(), sums.end(), 0.0);
}

// Calls body(A()) with the type that is computed in.
template <class Body>
void with_wide(const at::Tensor& weight, const Body& body) {
  weight.scalar_type() == at::kDouble ? body(double()) : body(float());
}

template <class A>
A number(const OptionalTensor& t, A missing) {
  return t ? A(t->item<double>()) : missing;
}

template <class A>
HardConcrete<A> hard_concrete(double lower, double upper, const OptionalTensor& scale) {
  return {A(lower), A(upper - lower), A(-lower / upper), number<A>(scale, 1)};
}

// The random bits of a piece; null without noise
template <class A>
const uint32_t* noise(const OptionalTensor& seed, int64_t begin, int64_t n) {
  if (!seed) return nullptr;
  uint32_t* words = workspace().random.get<uint32_t>(kPiece + 64);
  current_kernels<A>().philox(uint64_t(*seed->const_data_ptr<int64_t>()), 0, uint64_t(begin), n,
                              words);
  return words;
}

at::Tensor scalar(double value, const at::Tensor& like, at::ScalarType dtype) {
  at::Tensor out = at::empty({}, like.options().dtype(dtype));
  out.fill_(value);
  return out;
}

OptionalTensor when(bool needed, const at::Tensor& like, at::ScalarType dtype) {
  return needed ? OptionalTensor(empty_like_flat(like, dtype)) : std::nullopt;
}

void check(const at::Tensor& diff, const at::Tensor& log_alpha, const at::Tensor& weight,
           const OptionalTensor& scale, const OptionalTensor& seed) {
  check_memory("diff", diff);
  check_memory("log_alpha", log_alpha);
  check_memory("weight", weight);
  check_memory("scale", scale);
  check_memory("seed", seed);
}

} // namespace

std::tuple<at::Tensor, at::Tensor> diff_pruning_fwd(const at::Tensor& diff,
                                                    const at::Tensor& log_alpha,
                                                    const at::Tensor& weight,
                                                    const OptionalTensor& scale,
                                                    const OptionalTensor& seed, double lower,
                                                    double upper, at::ScalarType dtype) {
  check(diff, log_alpha, weight, scale, seed);
  const at::Tensor out = empty_like_flat(weight, dtype);
  at::Tensor count;
  with_wide(weight, [&](auto zero) {
    using A = decltype(zero);
    const Kernels<A>& kernels = current_kernels<A>();
    const HardConcrete<A> gate = hard_concrete<A>(lower, upper, scale);
    const Pieces<A> w(weight), d(diff), a(log_alpha), y = Pieces<A>::output(out);
    const double open = each_piece<A>(weight.numel(), [&](int64_t begin, int64_t n, A* room) {
      A* to = y.start(begin, room + 3 * kPiece);
      const A found = kernels.gates.diff(n, w.read(begin, n, room), d.read(begin, n, room + kPiece),
                                         a.read(begin, n, room + 2 * kPiece),
                                         noise<A>(seed, begin, n), gate, to);
      y.finish(begin, n, to);
      return found;
    });
    count = scalar(open, weight, at::CppTypeToScalarType<A>::value);
  });
  return {out, count};
}

DiffPruningGradients diff_pruning_bwd(const at::Tensor& diff, const at::Tensor& log_alpha,
                                      const at::Tensor& weight, const OptionalTensor& scale,
                                      const OptionalTensor& seed, const OptionalTensor& dmade,
                                      const OptionalTensor& dcount, double lower, double upper,
                                      bool need_diff, bool need_log_alpha, bool need_scale,
                                      bool need_out, at::ScalarType dtype) {
  check(diff, log_alpha, weight, scale, seed);
  check_memory("dmade", dmade);
  check_memory("dcount", dcount);
  const OptionalTensor out = when(need_out, weight, dtype),
                       ddiff = when(need_diff, diff, diff.scalar_type()),
                       dlog_alpha = when(need_log_alpha, log_alpha, log_alpha.scalar_type());
  OptionalTensor dscale;
  with_wide(weight, [&](auto zero) {
    using A = decltype(zero);
    const Kernels<A>& kernels = current_kernels<A>();
    const HardConcrete<A> gate = hard_concrete<A>(lower, upper, scale);
    const A gcount = number<A>(dcount, 0);
    const Pieces<A> w(weight), d(diff), a(log_alpha),
        g = Pieces<A>::maybe(dmade), to_out = Pieces<A>::output(out),
        to_diff = Pieces<A>::output(ddiff), to_alpha = Pieces<A>::output(dlog_alpha);
    const double along = each_piece<A>(weight.numel(), [&](int64_t begin, int64_t n, A* room) {
      A* y = to_out.start(begin, room + 4 * kPiece);
      A* dd = to_diff.start(begin, room + 5 * kPiece);
      A* da = to_alpha.start(begin, room + 6 * kPiece);
      const A found = kernels.gates.diff_backward(
          n, g.read(begin, n, room), gcount, w.read(begin, n, room + kPiece),
          d.read(begin, n, room + 2 * kPiece), a.read(begin, n, room + 3 * kPiece),
          noise<A>(seed, begin, n), gate, y, dd, da);
      to_out.finish(begin, n, y);
      to_diff.finish(begin, n, dd);
      to_alpha.finish(begin, n, da);
      return found;
    });
    if (need_scale) dscale = scalar(along, weight, at::CppTypeToScalarType<A>::value);
  });
  return {ddiff, dlog_alpha, dscale, out};
}

at::Tensor masking_fwd(const at::Tensor& weight, const at::Tensor& scores, double threshold,
                       at::ScalarType dtype) {
  return *std::get<2>(
      masking_bwd(weight, scores, std::nullopt, threshold, false, false, true, dtype));
}

MaskingGradients masking_bwd(const at::Tensor& weight, const at::Tensor& scores,
                             const OptionalTensor& dmade, double threshold, bool need_scores,
                             bool need_weight, bool need_out, at::ScalarType dtype) {
  check_memory("weight", weight);
  check_memory("scores", scores);
  check_memory("dmade", dmade);
  const OptionalTensor out = when(need_out, weight, dtype),
                       dscores = when(need_scores, scores, scores.scalar_type()),
                       dweight = when(need_weight, weight, weight.scalar_type());
  // as a comparison with a tensor of that dtype rounds it
  const at::Tensor level = scalar(threshold, scores, scores.scalar_type());
  with_wide(weight, [&](auto zero) {
    using A = decltype(zero);
    const Kernels<A>& kernels = current_kernels<A>();
    const A least = number<A>(level, 0);
    const Pieces<A> w(weight), s(scores),
        g = Pieces<A>::maybe(dmade), to_out = Pieces<A>::output(out),
        to_scores = Pieces<A>::output(dscores), to_weight = Pieces<A>::output(dweight);
    each_piece<A>(weight.numel(), [&](int64_t begin, int64_t n, A* room) {
      A* y = to_out.start(begin, room + 3 * kPiece);
      A* ds = to_scores.start(begin, room + 4 * kPiece);
      A* dw = to_weight.start(begin, room + 5 * kPiece);
      kernels.gates.mask(n, g.read(begin, n, room), w.read(begin, n, room + kPiece),
                         s.read(begin, n, room + 2 * kPiece), least, y, ds, dw);
      to_out.finish(begin, n, y);
      to_scores.finish(begin, n, ds);
      to_weight.finish(begin, n, dw);
      return A(0);
    });
  });
  return {dscores, dweight, out};
}

} // namespace pelt_fast
