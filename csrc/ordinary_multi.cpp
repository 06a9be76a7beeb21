#include <ATen/Functions.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/lora.h"
#include "cpu/multi_bottleneck.h"
#include "cpu/multi_elementwise.h"
#include "cpu/multi_lora.h"
#include "cpu/shape.h"
#include "ordinary.h"
#include "ordinary_adapter.h"
#include "ordinary_lora.h"
#include "reader.h"

namespace py = pybind11;

namespace pelt_fast {
namespace {

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
    // of a bias that trains the gradient is frozen_linear's, and so are the bits without one
    reader.expect(n == 1 && !has_base && frozen &&
                  !(frozen->bias && frozen->bias->requires_grad()));
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
