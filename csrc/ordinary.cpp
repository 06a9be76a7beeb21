#include "ordinary.h"

#include <ATen/Functions.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/profiler/api.h>

#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "check.h"
#include "cpu/adapter.h"
#include "cpu/compacter.h"
#include "cpu/fusion.h"
#include "cpu/gated_lora.h"
#include "cpu/lora.h"
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
  double epsilon(py::handle h) {
    const double eps = number(h);
    expect(eps >= 0);
    return eps;
  }

 private:
  const at::Tensor* plain(py::handle h) {
    if (!THPVariable_CheckExact(h.ptr())) return refuse(), nullptr;
    const at::Tensor& t = THPVariable_Unpack(h.ptr());
    if (!is_plain(t) || t._fw_grad(0).defined() || !has_memory(t)) return refuse(), nullptr;
    gradient = gradient || wants_grad(t);
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
  if (!h.gate.is_none()) {
    const at::Tensor* g = reader.tensor(h.gate, true);
    std::vector<int64_t> shape(reader.x().sizes().begin(), reader.x().sizes().end());
    shape.back() = 1;
    if (g) {
      reader.expect(g->dim() <= int64_t(shape.size()));
      for (int64_t i = 1; reader.ordinary && i <= g->dim(); ++i)
        reader.expect(g->size(-i) == 1 || g->size(-i) == shape[shape.size() - size_t(i)]);
    }
    if (reader.ordinary) t.gate = g->expand(shape).reshape({-1});
  }

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

} // namespace pelt_fast
