#include "ordinary_adapter.h"

#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/python_variable.h>

#include <optional>
#include <vector>

#include "cpu/adapter.h"
#include "cpu/compacter.h"
#include "cpu/fusion.h"
#include "cpu/shape.h"
#include "ordinary.h"

namespace py = pybind11;

namespace pelt_fast {

Terms::Terms(Reader& reader, py::handle x, py::handle residual, py::handle skip)
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

namespace {

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

} // namespace pelt_fast
