#include "ordinary.h"

#include <ATen/Functions.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/profiler/api.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "check.h"
#include "cpu/adapter.h"
#include "cpu/compacter.h"
#include "cpu/dropout.h"
#include "cpu/fusion.h"
#include "cpu/gated_lora.h"
#include "cpu/lora.h"
#include "cpu/lora_pass.h"
#include "cpu/multi_bottleneck.h"
#include "cpu/multi_elementwise.h"
#include "cpu/multi_lora.h"
#include "cpu/shape.h"

namespace py = pybind11;

namespace pelt_fast {
namespace {

// Nothing in this thread sees operators on their way to a kernel.
bool nothing_between() {
  const auto keys = c10::impl::tls_local_dispatch_key_set();
  return (keys.included_ - c10::default_included_set).empty() &&
         !at::autocast::is_autocast_enabled(at::kCPU) &&
         at::impl::PythonTorchFunctionTLS::stack_len() == 0 &&
         !torch::profiler::impl::profilerEnabled();
}

// A tensor of torch's own class whose data is in the CPU's memory.
bool is_plain(const at::Tensor& t) {
  constexpr c10::DispatchKeySet keys = c10::DispatchKeySet(c10::DispatchKey::CPU) |
                                       c10::autograd_dispatch_keyset_with_ADInplaceOrView |
                                       c10::autocast_dispatch_keyset;
  // a difference of key sets would keep the backend's bit
  return t.defined() && (t.key_set().raw_repr() & ~keys.raw_repr()) == 0 &&
         t.layout() == at::kStrided;
}

bool wants_grad(const at::Tensor& t) {
  return t.requires_grad() && at::GradMode::is_enabled();
}

// Reads arguments; the first one that is not ordinary settles it.
class Reader {
 public:
  bool ordinary = true, gradient = false;

  explicit Reader(py::handle x) {
    ordinary = nothing_between();
    const at::Tensor* t = plain(x);
    if (!t || t->dim() == 0 || t->numel() == 0) {
      refuse();
      return;
    }
    x_ = t;
    const auto dtype = t->scalar_type();
    half_ = dtype == at::kHalf || dtype == at::kBFloat16;
    ordinary = ordinary && (half_ || dtype == at::kFloat || dtype == at::kDouble);
  }

  const at::Tensor& x() const { return *x_; }
  void refuse() { ordinary = false; }
  void expect(bool condition) { ordinary = ordinary && condition; }

  // A tensor of x's dtype, or, where wider is true, of float32 over half precision.
  const at::Tensor* tensor(py::handle h, bool wider) {
    const at::Tensor* t = ordinary ? plain(h) : nullptr;
    if (t && t->scalar_type() != x_->scalar_type())
      expect(wider && half_ && t->scalar_type() == at::kFloat);
    return ordinary ? t : nullptr;
  }
  const at::Tensor* matrix(py::handle h, int64_t rows, int64_t columns, bool wider) {
    const at::Tensor* t = tensor(h, wider);
    if (t)
      expect(t->dim() == 2 && (rows < 0 || t->size(0) == rows) && t->size(1) == columns &&
             t->numel() > 0);
    return ordinary ? t : nullptr;
  }
  OptionalTensor vector(py::handle h, int64_t size, bool wider) {
    if (h.is_none()) return {};
    const at::Tensor* t = tensor(h, wider);
    if (t) expect(t->dim() == 1 && t->size(0) == size);
    return ordinary ? OptionalTensor(*t) : OptionalTensor();
  }
  // None where it is not as large as x.
  OptionalTensor like_x(py::handle h) {
    const at::Tensor* t = tensor(h, false);
    if (t) expect(t->sizes() == x_->sizes());
    return ordinary ? OptionalTensor(*t) : OptionalTensor();
  }
  double number(py::handle h) {
    double value = 0;
    if (PyFloat_CheckExact(h.ptr()))
      value = PyFloat_AS_DOUBLE(h.ptr());
    else if (PyLong_CheckExact(h.ptr()))
      value = PyLong_AsDouble(h.ptr());
    else
      refuse();
    if (PyErr_Occurred()) PyErr_Clear(), refuse();
    expect(std::isfinite(value));
    return value;
  }
  double probability(py::handle h) {
    const double p = number(h);
    expect(p >= 0 && p <= 1);
    return p;
  }
  // Plain, its memory there; notes whether it wants a gradient.
  bool is_there(const at::Tensor& t) {
    if (!is_plain(t) || t._fw_grad(0).defined() || !has_memory(t)) return false;
    gradient = gradient || wants_grad(t);
    return true;
  }
  double epsilon(py::handle h) {
    const double eps = number(h);
    expect(eps >= 0);
    return eps;
  }

 private:
  const at::Tensor* plain(py::handle h) {
    if (!THPVariable_CheckExact(h.ptr())) return refuse(), nullptr;
    const at::Tensor& t = THPVariable_Unpack(h.ptr());
    if (!is_there(t)) return refuse(), nullptr;
    return &t;
  }

  static bool has_memory(const at::Tensor& t) {
    const size_t needed = at::detail::computeStorageNbytes(t.sizes(), t.strides(), t.itemsize(),
                                                           size_t(t.storage_offset()));
    return needed <= t.storage().nbytes();
  }

  const at::Tensor* x_ = nullptr;
  bool half_ = false;
};

// One, or a list or tuple of them.
std::vector<py::handle> several(py::handle h) {
  if (!PyList_CheckExact(h.ptr()) && !PyTuple_CheckExact(h.ptr())) return {h};
  std::vector<py::handle> items;
  for (py::handle item : py::reinterpret_borrow<py::sequence>(h)) items.push_back(item);
  return items;
}

py::tuple tuple_of(const std::vector<py::handle>& items) {
  py::tuple out(items.size());
  for (size_t i = 0; i < items.size(); ++i) out[i] = py::reinterpret_borrow<py::object>(items[i]);
  return out;
}

// as many numbers as adapters: one for all, or one each
template <class Read>
std::vector<double> numbers(Reader& reader, py::handle h, size_t n, Read read) {
  const std::vector<py::handle> items = several(h);
  const bool each = PyList_CheckExact(h.ptr()) || PyTuple_CheckExact(h.ptr());
  reader.expect(!each || items.size() == n);
  std::vector<double> out;
  for (size_t i = 0; reader.ordinary && i < n; ++i) out.push_back(read(items[each ? i : 0]));
  return out;
}

constexpr int64_t kMaxRank = 256; // of pelt_fast/functional/lora.py

} // namespace

bool is_direct(const py::args& arguments) {
  if (!nothing_between()) return false;
  const auto plain = [](py::handle h) {
    return !THPVariable_Check(h.ptr()) ||
           (THPVariable_CheckExact(h.ptr()) && is_plain(THPVariable_Unpack(h.ptr())));
  };
  for (py::handle h : arguments) {
    if (PyList_CheckExact(h.ptr()) || PyTuple_CheckExact(h.ptr())) {
      for (py::handle item : py::reinterpret_borrow<py::sequence>(h))
        if (!plain(item)) return false;
    } else if (!plain(h)) {
      return false;
    }
  }
  return true;
}

py::object ordinary_lora_linear(py::handle x, py::handle weight, py::handle bias, py::handle lora_a,
                                py::handle lora_b, py::handle scaling, py::handle lora_bias,
                                py::handle dropout_p, bool training) {
  Reader reader(x);
  if (!reader.ordinary) return py::none();
  const int64_t in = reader.x().size(-1);
  const at::Tensor* w = reader.matrix(weight, -1, in, false);
  // of a weight that trains, or whose changes leave no trace, no packed copy may be kept
  if (!w || w->requires_grad() || w->is_inference()) return py::none();
  const int64_t out = w->size(0);
  const OptionalTensor b = reader.vector(bias, out, false);

  const std::vector<py::handle> all_a = several(lora_a), all_b = several(lora_b);
  const size_t n = all_a.size();
  std::vector<py::handle> all_bias =
      lora_bias.is_none() ? std::vector<py::handle>(n, py::handle(Py_None)) : several(lora_bias);
  reader.expect(n > 0 && all_b.size() == n && all_bias.size() == n);
  std::vector<at::Tensor> as, bs;
  std::vector<OptionalTensor> biases;
  for (size_t i = 0; reader.ordinary && i < n; ++i) {
    const at::Tensor* a = reader.matrix(all_a[i], -1, in, true);
    if (!a) break;
    reader.expect(a->size(0) <= kMaxRank);
    const at::Tensor* expand = reader.matrix(all_b[i], out, a->size(0), true);
    if (!expand) break;
    as.push_back(*a);
    bs.push_back(*expand);
    biases.push_back(reader.vector(all_bias[i], out, true));
  }
  const std::vector<double> factors =
      numbers(reader, scaling, n, [&](py::handle h) { return reader.number(h); });
  std::vector<double> rates =
      numbers(reader, dropout_p, n, [&](py::handle h) { return reader.probability(h); });
  if (!reader.ordinary) return py::none();
  if (!training) rates.assign(n, 0.0);
  bool drops = false;
  for (double rate : rates) drops = drops || rate > 0;

  if (reader.gradient || drops) {
    return py::make_tuple(tuple_of(all_a), tuple_of(all_b), tuple_of(all_bias),
                          py::tuple(py::cast(factors)), py::tuple(py::cast(rates)));
  }
  // one token in float32 is torch's: pelt_fast/backends/cpp/lora.py
  const int64_t tokens = reader.x().numel() / in;
  if (tokens == 1 && reader.x().scalar_type() == at::kFloat) return py::none();
  at::Tensor y;
  {
    py::gil_scoped_release release;
    const at::NoGradGuard no_grad;
    y = from_rows(std::get<0>(lora_linear_fwd(to_rows(reader.x()), *w, b, as, bs, biases, factors,
                                              rates, std::nullopt)),
                  reader.x());
  }
  return py::cast(y);
}

namespace {

// Where a product with a packed weight beats torch's own. Few rows: nothing to pack at each call.
// Half precision: torch has no fast product without instructions for it. Many rows of float32:
// measured on AVX2, where torch's library takes 1.1 to 1.3 times as long. A gradient changes
// nothing: a checkpoint runs without and again with one, and must find the same bits.
bool pays_to_pack(at::ScalarType dtype, int64_t rows) {
  if (rows < 2) return false; // torch's matrix times vector
  if (at::elementSize(dtype) == 2) return true;
  if (rows <= kFewRows) return true;
  return dtype == at::kFloat && current_isa() == Isa::kAvx2;
}

// A linear with a frozen weight whose packed product pays, of x.
struct FrozenLinear {
  at::Tensor weight;
  OptionalTensor bias;
};
std::optional<FrozenLinear> ordinary_frozen(Reader& reader, py::handle weight, py::handle bias) {
  if (!reader.ordinary) return {};
  const int64_t in = reader.x().size(-1), tokens = reader.x().numel() / in;
  const at::Tensor* w = reader.matrix(weight, -1, in, false);
  if (!w || w->requires_grad() || w->is_inference()) return {};
  const OptionalTensor b = reader.vector(bias, w->size(0), false);
  if (!reader.ordinary || !pays_to_pack(reader.x().scalar_type(), tokens)) return {};
  return FrozenLinear{*w, b};
}

// With a gradient forward and backward are lora_linear's, which packs at each call what it has no
// room for.
bool has_both_packed(const at::Tensor& weight) {
  return has_packed(weight) && has_packed(weight.t());
}

} // namespace

py::object ordinary_frozen_linear(py::handle x, py::handle weight, py::handle bias) {
  Reader reader(x);
  const std::optional<FrozenLinear> frozen = ordinary_frozen(reader, weight, bias);
  if (!frozen) return py::none();
  if (reader.gradient) return has_both_packed(frozen->weight) ? py::cast(true) : py::none();
  OptionalTensor y;
  {
    py::gil_scoped_release release;
    const at::NoGradGuard no_grad;
    y = frozen_linear(to_rows(reader.x()), frozen->weight, frozen->bias);
    if (y) y = from_rows(*y, reader.x());
  }
  return py::cast(y);
}

py::object ordinary_dropout(py::handle x, py::handle p) {
  Reader reader(x);
  const double rate = reader.probability(p);
  reader.expect(rate > 0 && rate < 1);
  if (!reader.ordinary || reader.x().scalar_type() != at::kFloat || !reader.x().is_contiguous())
    return py::none();
  at::Tensor mask;
  {
    py::gil_scoped_release release;
    if (draws_as_torch()) mask = draw_mask(reader.x().numel(), 1.0 - rate);
  }
  return mask.defined() ? py::cast(mask) : py::none();
}

py::object ordinary_gated_lora_linear(py::handle x, py::handle weight, py::handle bias,
                                      py::handle lora_a, py::handle lora_b, py::handle gate_weight,
                                      py::handle gate_bias, py::handle scaling,
                                      py::handle dropout_p, bool training) {
  Reader reader(x);
  if (!reader.ordinary || reader.x().dim() < 2) return py::none();
  const int64_t in = reader.x().size(-1);
  const at::Tensor* w = reader.matrix(weight, -1, in, false);
  if (!w || w->requires_grad() || w->is_inference()) return py::none();
  const OptionalTensor b = reader.vector(bias, w->size(0), false);
  const at::Tensor* a = reader.matrix(lora_a, -1, in, true);
  if (!a || a->size(0) > kMaxRank) return py::none();
  const at::Tensor* expand = reader.matrix(lora_b, w->size(0), a->size(0), true);
  const at::Tensor* gate = reader.matrix(gate_weight, 1, in, true);
  const OptionalTensor offset = reader.vector(gate_bias, 1, true);
  const double factor = reader.number(scaling);
  const double probability = reader.probability(dropout_p), rate = training ? probability : 0.0;
  if (!reader.ordinary) return py::none();
  const int64_t tokens = reader.x().numel() / in, samples = tokens / reader.x().size(-2);
  if (reader.gradient || rate > 0) return py::make_tuple(factor, rate, samples);
  if (tokens == 1 && reader.x().scalar_type() == at::kFloat) return py::none();
  at::Tensor y;
  {
    py::gil_scoped_release release;
    const at::NoGradGuard no_grad;
    y = from_rows(
        std::get<0>(gated_lora_linear_fwd(
            to_rows(reader.x()), *w, b,
            {*a, *expand, *gate, offset, std::nullopt, factor, 0.0, std::nullopt}, samples)),
        reader.x());
  }
  return py::cast(y);
}

namespace {

// At most one more tensor of x's size, and where it and x are added: `terms` of
// functional/adapter_checks.py.
struct Terms {
  OptionalTensor other;
  py::handle given; // the same in Python
  bool skip_in, residual_x = false, residual_skip = false;

  Terms(Reader& reader, py::handle x, py::handle residual, py::handle skip)
      : given(skip), skip_in(!skip.is_none()) {
    for (py::handle r : residual.is_none() ? std::vector<py::handle>() : several(residual)) {
      if (r.is_none()) {
        reader.refuse();
      } else if (r.ptr() == x.ptr()) {
        reader.expect(!residual_x);
        residual_x = true;
      } else {
        reader.expect(!residual_skip && (given.is_none() || given.ptr() == r.ptr()));
        given = r;
        residual_skip = true;
      }
    }
    if (!given.is_none()) other = reader.like_x(given);
  }
};

// (..., 1), broadcastable, to (T,).
OptionalTensor gate_of(Reader& reader, py::handle h) {
  if (h.is_none()) return {};
  const at::Tensor* g = reader.tensor(h, true);
  if (!g) return {};
  std::vector<int64_t> shape(reader.x().sizes().begin(), reader.x().sizes().end());
  shape.back() = 1;
  reader.expect(g->dim() <= int64_t(shape.size()));
  for (int64_t i = 1; reader.ordinary && i <= g->dim(); ++i)
    reader.expect(g->size(-i) == 1 || g->size(-i) == shape[shape.size() - size_t(i)]);
  return reader.ordinary ? OptionalTensor(g->expand(shape).reshape({-1})) : std::nullopt;
}

// All arguments but the projections', and the call.
template <class Tensors, class Forward>
py::object ordinary_around(Reader& reader, const AroundAdapter& h, int64_t m, Tensors& t,
                           const Forward& forward) {
  const int64_t d = reader.x().size(-1);
  t.down_bias = reader.vector(h.down_bias, m, true);
  t.up_bias = reader.vector(h.up_bias, d, true);
  t.pre_weight = reader.vector(h.pre_weight, d, true);
  t.pre_bias = reader.vector(h.pre_bias, d, true);
  t.ln_weight = reader.vector(h.ln_weight, d, true);
  t.ln_bias = reader.vector(h.ln_bias, d, true);
  reader.expect(t.pre_weight || !t.pre_bias);
  reader.expect(t.ln_weight || !t.ln_bias);
  AdapterSettings s{
      h.activation, 1.0,  reader.epsilon(h.pre_eps), reader.epsilon(h.eps), 0.0, false,
      false,        false};
  const double rate = reader.probability(h.dropout_p);
  s.dropout_p = h.training ? rate : 0.0;
  if (THPVariable_Check(h.scaling.ptr())) {
    const at::Tensor* scale = reader.tensor(h.scaling, true);
    if (scale) reader.expect(scale->dim() <= 1 && (scale->numel() == 1 || scale->numel() == d));
    if (reader.ordinary) t.scale = scale->reshape({-1});
  } else {
    s.scaling = reader.number(h.scaling);
  }
  t.gate = gate_of(reader, h.gate);

  Terms terms(reader, h.x, h.residual, h.skip);
  s.skip_in = terms.skip_in;
  s.residual_x = terms.residual_x;
  s.residual_skip = terms.residual_skip;
  if (!reader.ordinary) return py::none();

  if (reader.gradient || s.dropout_p > 0) {
    return py::make_tuple(py::make_tuple(s.scaling, s.pre_eps, s.eps, s.dropout_p, s.skip_in,
                                         s.residual_x, s.residual_skip),
                          terms.given, t.scale, t.gate);
  }
  at::Tensor y;
  {
    py::gil_scoped_release release;
    const at::NoGradGuard no_grad;
    if (terms.other) terms.other = to_rows(*terms.other);
    y = from_rows(std::get<0>(forward(to_rows(reader.x()), terms.other, t, s)), reader.x());
  }
  return py::cast(y);
}

// The tensors of a PHM weight of n Kronecker products from `in` features to some; those where it is
// ordinary.
std::optional<Phm> ordinary_phm(Reader& reader, const PhmArguments& h) {
  const at::Tensor *rule = reader.tensor(h.rule, true), *left = reader.tensor(h.left, true),
                   *right = reader.tensor(h.right, true);
  if (!reader.ordinary) return {};
  reader.expect(rule->dim() == 3 && left->dim() == 3 && right->dim() == 3);
  if (!reader.ordinary) return {};
  const int64_t n = rule->size(0);
  reader.expect(rule->size(1) == n && rule->size(2) == n && left->size(0) == n &&
                right->size(0) == n && left->size(2) == right->size(1) && rule->numel() > 0 &&
                left->numel() > 0 && right->numel() > 0);
  if (!reader.ordinary) return {};
  return Phm{*rule, *left, *right};
}

} // namespace

py::object ordinary_adapter(py::handle down, py::handle up, const AroundAdapter& around) {
  Reader reader(around.x);
  if (!reader.ordinary) return py::none();
  const int64_t d = reader.x().size(-1);
  const at::Tensor* d_weight = reader.matrix(down, -1, d, true);
  if (!d_weight) return py::none();
  const int64_t m = d_weight->size(0);
  const at::Tensor* u_weight = reader.matrix(up, d, m, true);
  if (!u_weight) return py::none();
  AdapterTensors t;
  t.down = *d_weight;
  t.up = *u_weight;
  return ordinary_around(reader, around, m, t, bottleneck_adapter_fwd);
}

py::object ordinary_compacter(const PhmArguments& down, const PhmArguments& up,
                              const AroundAdapter& around) {
  Reader reader(around.x);
  if (!reader.ordinary) return py::none();
  const int64_t d = reader.x().size(-1);
  CompacterTensors t;
  for (const auto& [to, from] : {std::pair{&t.down, &down}, std::pair{&t.up, &up}}) {
    std::optional<Phm> found = ordinary_phm(reader, *from);
    if (!found) return py::none();
    *to = *found;
  }
  const int64_t n = t.down.rule.size(0), m = n * t.down.right.size(2);
  // dense matrices where they take fewer products: pays() of pelt_fast/phm.py
  const int64_t width = n * (t.down.left.size(2) + t.up.left.size(2));
  reader.expect(t.up.rule.size(0) == n && n * t.down.left.size(1) == d &&
                n * t.up.left.size(1) == m && n * t.up.right.size(2) == d &&
                width * d + width * n * m < 2 * d * m);
  if (!reader.ordinary) return py::none();
  return ordinary_around(reader, around, m, t, compacter_fwd);
}

py::object ordinary_fusion(const FoldedMatrices& folded, const AroundFusion& h) {
  Reader reader(h.x);
  if (!reader.ordinary) return py::none();
  const int64_t d = reader.x().size(-1), n = int64_t(h.widths.size());
  FusionTensors t;
  t.down = folded.down;
  t.down_bias = folded.down_bias;
  t.score = folded.score;
  t.score_bias = folded.score_bias;
  t.value = folded.value;
  t.pre_weight = reader.vector(h.pre_weight, d, true);
  t.pre_bias = reader.vector(h.pre_bias, d, true);
  t.ln_weight = reader.vector(h.ln_weight, d, true);
  t.ln_bias = reader.vector(h.ln_bias, d, true);
  reader.expect(t.pre_weight || !t.pre_bias);
  reader.expect(t.ln_weight || !t.ln_bias);
  const double temperature = reader.number(h.temperature), pre_eps = reader.epsilon(h.pre_eps),
               eps = reader.epsilon(h.eps), rate = reader.probability(h.dropout_p);
  reader.expect(temperature > 0 && !(h.training && rate > 0));
  Terms terms(reader, h.x, h.residual, h.skip);
  OptionalTensor query;
  if (!h.query.is_none()) query = reader.like_x(h.query);
  if (!reader.ordinary || reader.gradient) return py::none();

  at::Tensor y, p;
  {
    py::gil_scoped_release release;
    const at::NoGradGuard no_grad;
    const at::Tensor& x = reader.x();
    if (terms.other) terms.other = to_rows(*terms.other);
    if (query) query = to_rows(*query);
    auto [rows, saved] =
        adapter_fusion_fwd(to_rows(x), terms.other, query, t,
                           {h.activation, h.widths, temperature, pre_eps, eps, 0.0, terms.skip_in,
                            terms.residual_x, terms.residual_skip, true});
    y = from_rows(rows, x);
    std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
    shape.back() = n;
    p = saved.p.to(x.scalar_type()).view(shape);
  }
  return py::make_tuple(y, p);
}

// ---- batched multi-LoRA ----

namespace {

bool is_list(py::handle h) {
  return PyList_CheckExact(h.ptr()) || PyTuple_CheckExact(h.ptr());
}

// A stack (L, rows, columns); -1: any size but 0.
const at::Tensor* stack_of(Reader& reader, py::handle h, int64_t adapters, int64_t rows,
                           int64_t columns) {
  const at::Tensor* t = reader.tensor(h, true);
  if (t)
    reader.expect(t->dim() == 3 && t->numel() > 0 && (adapters < 0 || t->size(0) == adapters) &&
                  (rows < 0 || t->size(1) == rows) && t->size(2) == columns);
  return reader.ordinary ? t : nullptr;
}

// Its rows can be changed in place: each element once, a view as rows, a change that torch allows.
bool can_change(const at::Tensor& base) {
  if (base.is_inference() && !c10::InferenceMode::is_enabled()) return false;
  const int64_t last = base.dim() - 1;
  bool fits = base.stride(last) == 1;
  for (int64_t i = 0; i < last; ++i)
    fits = fits && (i + 1 < last ? base.stride(i) == base.size(i + 1) * base.stride(i + 1)
                                 : base.stride(i) >= base.size(last));
  return fits;
}

// The arrays of a plan of this many tokens, which are its own and int32; none where they are not.
std::vector<at::Tensor> plan_of(Reader& reader, py::handle arrays, int64_t tokens,
                                int64_t adapters) {
  std::vector<at::Tensor> plan;
  const std::vector<py::handle> items = several(arrays);
  reader.expect(items.size() == 7);
  for (size_t i = 0; reader.ordinary && i < items.size(); ++i) {
    if (!THPVariable_CheckExact(items[i].ptr())) return reader.refuse(), plan;
    plan.push_back(THPVariable_Unpack(items[i].ptr()));
    reader.expect(is_plain(plan[i]) && plan[i].scalar_type() == at::kInt);
  }
  if (reader.ordinary)
    reader.expect(plan[0].dim() == 1 && plan[0].size(0) >= tokens && plan[0].is_contiguous() &&
                  plan[1].dim() == 1 && plan[1].size(0) >= tokens && plan[1].is_contiguous() &&
                  plan[2].dim() == 1 && plan[2].size(0) == adapters + 2 && plan[2].is_contiguous());
  return plan;
}

// (L,) of one number for all adapters, or as given where that is of the dtype that kernels read.
OptionalTensor of_adapters(Reader& reader, py::handle h, int64_t adapters, at::ScalarType dtype) {
  if (!THPVariable_CheckExact(h.ptr())) return reader.refuse(), std::nullopt;
  const at::Tensor& t = THPVariable_Unpack(h.ptr());
  reader.expect(is_plain(t) && t.dim() == 1 && t.size(0) == adapters && t.scalar_type() == dtype &&
                !wants_grad(t));
  return reader.ordinary ? OptionalTensor(t) : std::nullopt;
}

} // namespace

py::object ordinary_multi_lora(py::handle x, py::handle weight, py::handle bias, py::handle lora_a,
                               py::handle lora_b, py::handle plan_arrays, int64_t plan_tokens,
                               int64_t plan_adapters, py::handle scaling, py::handle ranks,
                               py::handle base_out, py::handle row_scale, py::handle dropout_p,
                               bool training) {
  Reader reader(x);
  if (!reader.ordinary) return py::none();
  const int64_t in = reader.x().size(-1), tokens = reader.x().numel() / in;
  const at::ScalarType dtype = reader.x().scalar_type(),
                       wide = dtype == at::kDouble ? at::kDouble : at::kFloat;
  const bool several_projections = is_list(lora_a), has_base = !base_out.is_none();
  const std::vector<py::handle> all_a = several(lora_a), all_b = several(lora_b),
                                all_base = has_base ? several(base_out) : std::vector<py::handle>();
  const size_t n = all_a.size();
  reader.expect(n > 0 && all_b.size() == n && (!has_base || all_base.size() == n) &&
                plan_tokens == tokens);
  std::optional<FrozenLinear> frozen;
  if (!weight.is_none()) {
    frozen = ordinary_frozen(reader, weight, bias);
    reader.expect(n == 1 && !has_base && frozen && !(frozen->bias && wants_grad(*frozen->bias)));
  }
  std::vector<at::Tensor> as, bs;
  std::vector<OptionalTensor> bases(n);
  for (size_t i = 0; reader.ordinary && i < n; ++i) {
    const at::Tensor* a = stack_of(reader, all_a[i], plan_adapters, -1, in);
    if (!a || a->size(1) > kMaxRank) return py::none();
    const at::Tensor* b =
        stack_of(reader, all_b[i], plan_adapters, frozen ? frozen->weight.size(0) : -1, a->size(1));
    if (!b) return py::none();
    as.push_back(*a);
    bs.push_back(*b);
    if (!has_base) continue;
    const at::Tensor* base = reader.tensor(all_base[i], false);
    if (!base) return py::none();
    reader.expect(base->dim() == reader.x().dim() && base->size(-1) == b->size(1) &&
                  base->sizes().slice(0, base->dim() - 1) ==
                      reader.x().sizes().slice(0, base->dim() - 1));
    bases[i] = *base;
  }
  OptionalTensor per_row;
  if (!row_scale.is_none()) {
    // of any floating dtype
    if (!THPVariable_CheckExact(row_scale.ptr())) return py::none();
    const at::Tensor& t = THPVariable_Unpack(row_scale.ptr());
    std::vector<int64_t> shape(reader.x().sizes().begin(), reader.x().sizes().end());
    shape.back() = 1;
    reader.expect(reader.is_there(t) && t.dim() <= int64_t(shape.size()) &&
                  (t.scalar_type() == at::kFloat || t.scalar_type() == at::kDouble ||
                   t.scalar_type() == at::kHalf || t.scalar_type() == at::kBFloat16));
    for (int64_t i = 1; reader.ordinary && i <= t.dim(); ++i)
      reader.expect(t.size(-i) == 1 || t.size(-i) == shape[shape.size() - size_t(i)]);
    if (!reader.ordinary) return py::none();
    per_row = t.expand(shape).reshape({-1});
  }
  const double probability = reader.probability(dropout_p), rate = training ? probability : 0.0;

  std::vector<at::Tensor> plan = plan_of(reader, plan_arrays, tokens, plan_adapters);
  if (!reader.ordinary) return py::none();

  const bool each_scaling = several_projections && is_list(scaling),
             each_ranks = several_projections && is_list(ranks);
  const std::vector<py::handle> scales = each_scaling ? several(scaling) : std::vector{scaling},
                                sizes = each_ranks ? several(ranks) : std::vector{ranks};
  reader.expect((!each_scaling || scales.size() == n) && (!each_ranks || sizes.size() == n));
  std::vector<at::Tensor> all_scaling, all_ranks;
  for (size_t i = 0; reader.ordinary && i < n; ++i) {
    const py::handle scale = scales[each_scaling ? i : 0], rank = sizes[each_ranks ? i : 0];
    if (THPVariable_Check(scale.ptr())) {
      const OptionalTensor t = of_adapters(reader, scale, plan_adapters, wide);
      if (t) all_scaling.push_back(*t);
    } else {
      const double factor = reader.number(scale);
      reader.expect(wide == at::kDouble || std::abs(factor) <= std::numeric_limits<float>::max());
      if (!reader.ordinary) return py::none();
      all_scaling.push_back(at::full({plan_adapters}, factor, at::TensorOptions().dtype(wide)));
    }
    if (rank.is_none()) {
      all_ranks.push_back(
          at::full({plan_adapters}, as[i].size(1), at::TensorOptions().dtype(at::kInt)));
    } else {
      const OptionalTensor t = of_adapters(reader, rank, plan_adapters, at::kInt);
      if (t) all_ranks.push_back(*t);
    }
  }
  if (!reader.ordinary) return py::none();

  const bool changes = has_base && !at::GradMode::is_enabled();
  if (changes) {
    if (rate > 0) return py::none();
    std::vector<const void*> read{reader.x().storage().data()};
    for (const auto* tensors : {&as, &bs, &plan, &all_scaling, &all_ranks})
      for (const at::Tensor& t : *tensors) read.push_back(t.storage().data());
    if (per_row) read.push_back(per_row->storage().data());
    for (size_t i = 0; i < n; ++i) { // what lies in one storage may overlap
      const void* place = bases[i]->storage().data();
      if (!can_change(*bases[i]) || std::find(read.begin(), read.end(), place) != read.end())
        return py::none();
      read.push_back(place);
    }
  } else if (reader.gradient || rate > 0) {
    if (frozen && !has_both_packed(frozen->weight)) return py::none();
    py::list tensors;
    for (py::handle h : all_a) tensors.append(h);
    for (py::handle h : all_b) tensors.append(h);
    for (size_t i = 0; i < n; ++i) tensors.append(has_base ? all_base[i] : py::handle(Py_None));
    for (const at::Tensor& t : all_ranks) tensors.append(py::cast(t));
    for (const at::Tensor& t : all_scaling) tensors.append(py::cast(t));
    return py::make_tuple(false, py::make_tuple(rate, per_row, tensors));
  }
  if (frozen && !has_packed(frozen->weight)) return py::none();
  std::vector<at::Tensor> y;
  {
    py::gil_scoped_release release;
    const at::NoGradGuard no_grad;
    for (OptionalTensor& base : bases)
      if (base) base = changes ? base->view({-1, base->size(-1)}) : to_rows(*base);
    const at::Tensor rows = to_rows(reader.x());
    const MultiLoRA call =
        multi_lora_of(rows, as, bs, plan, all_ranks, all_scaling, per_row, 0.0, std::nullopt);
    y = frozen ? multi_lora_linear_fwd(rows, frozen->weight, frozen->bias, call).y
               : multi_lora_fwd(rows, bases, call, changes).y;
    for (at::Tensor& t : y) t = from_rows(t, reader.x());
  }
  py::tuple out(n);
  for (size_t i = 0; i < n; ++i) {
    if (changes) {
      const at::Tensor& base = THPVariable_Unpack(all_base[i].ptr());
      if (!base.is_inference()) base.unsafeGetTensorImpl()->bump_version();
      out[i] = py::reinterpret_borrow<py::object>(all_base[i]);
    } else {
      out[i] = py::cast(y[i]);
    }
  }
  return py::make_tuple(true, several_projections ? py::object(out) : py::object(out[0]));
}

py::object ordinary_multi_elementwise(py::handle x, py::handle scales, py::handle biases,
                                      py::handle plan_arrays, int64_t plan_tokens,
                                      int64_t plan_adapters) {
  Reader reader(x);
  if (!reader.ordinary) return py::none();
  const int64_t features = reader.x().size(-1), tokens = reader.x().numel() / features;
  reader.expect(plan_tokens == tokens && !(scales.is_none() && biases.is_none()));
  OptionalTensor of[2];
  at::ScalarType dtype = reader.x().scalar_type();
  for (int i = 0; reader.ordinary && i < 2; ++i) {
    const py::handle given = i ? biases : scales;
    if (given.is_none()) continue;
    const at::Tensor* t = reader.matrix(given, plan_adapters, features, true);
    if (!t) return py::none();
    dtype = at::promote_types(dtype, t->scalar_type());
    of[i] = *t;
  }
  const std::vector<at::Tensor> plan = plan_of(reader, plan_arrays, tokens, plan_adapters);
  if (!reader.ordinary || reader.gradient) return py::none();
  at::Tensor y;
  {
    py::gil_scoped_release release;
    const at::NoGradGuard no_grad;
    for (OptionalTensor& t : of)
      if (t) t = to_rows(t->to(dtype));
    y = from_rows(multi_elementwise_fwd(to_rows(reader.x()), of[0], of[1], plan[0]), reader.x());
  }
  return py::cast(y);
}

py::object ordinary_multi_bottleneck(py::handle down, py::handle up, py::handle plan_arrays,
                                     int64_t plan_tokens, int64_t plan_adapters, py::handle widths,
                                     const AroundAdapter& h) {
  Reader reader(h.x);
  if (!reader.ordinary) return py::none();
  const int64_t d = reader.x().size(-1), tokens = reader.x().numel() / d, adapters = plan_adapters;
  reader.expect(plan_tokens == tokens);
  const at::Tensor* d_weight = stack_of(reader, down, adapters, -1, d);
  if (!d_weight) return py::none();
  const int64_t m = d_weight->size(1);
  const at::Tensor* u_weight = stack_of(reader, up, adapters, d, m);
  if (!u_weight) return py::none();
  const auto matrix = [&](py::handle of, int64_t columns) {
    const at::Tensor* t = of.is_none() ? nullptr : reader.matrix(of, adapters, columns, true);
    return t ? OptionalTensor(*t) : std::nullopt;
  };
  MultiBottleneck call{*d_weight, *u_weight, matrix(h.down_bias, m), matrix(h.up_bias, d)};
  call.ln_weight = reader.vector(h.ln_weight, d, true);
  call.ln_bias = reader.vector(h.ln_bias, d, true);
  reader.expect(call.ln_weight || !call.ln_bias);
  call.scaling = 1.0;
  if (THPVariable_Check(h.scaling.ptr()))
    call.scale = reader.vector(h.scaling, adapters, true);
  else
    call.scaling = reader.number(h.scaling);
  call.gate = gate_of(reader, h.gate);
  call.eps = reader.epsilon(h.eps);
  call.dropout_p = 0.0;
  reader.expect(reader.probability(h.dropout_p) == 0.0 || !h.training);
  Terms terms(reader, h.x, h.residual, h.skip);
  call.residual_x = terms.residual_x;
  call.activation = h.activation;
  call.plan = plan_of(reader, plan_arrays, tokens, adapters);
  const OptionalTensor of_each = widths.is_none()
                                     ? at::full({adapters}, m, at::TensorOptions().dtype(at::kInt))
                                     : of_adapters(reader, widths, adapters, at::kInt);
  if (!reader.ordinary || reader.gradient) return py::none();
  call.widths = *of_each;
  at::Tensor y;
  {
    py::gil_scoped_release release;
    const at::NoGradGuard no_grad;
    if (terms.other) terms.other = to_rows(*terms.other);
    y = from_rows(std::get<0>(multi_bottleneck_fwd(to_rows(reader.x()), terms.other, call)),
                  reader.x());
  }
  return py::cast(y);
}

} // namespace pelt_fast
