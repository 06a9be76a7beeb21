#include "ordinary_lora.h"

#include <ATen/core/grad_mode.h>

#include "cpu/gated_lora.h"
#include "cpu/isa.h"
#include "cpu/lora.h"
#include "cpu/lora_pass.h"
#include "cpu/shape.h"
#include "ordinary.h"

namespace py = pybind11;

namespace pelt_fast {
namespace {

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

} // namespace

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

std::optional<FrozenLinear> ordinary_frozen(Reader& reader, py::handle weight, py::handle bias) {
  if (!reader.ordinary) return {};
  const int64_t in = reader.x().size(-1), tokens = reader.x().numel() / in;
  const at::Tensor* w = reader.matrix(weight, -1, in, false);
  if (!w || w->requires_grad() || w->is_inference()) return {};
  const OptionalTensor b = reader.vector(bias, w->size(0), false);
  if (!reader.ordinary || !pays_to_pack(reader.x().scalar_type(), tokens)) return {};
  return FrozenLinear{*w, b};
}

bool has_both_packed(const at::Tensor& weight) {
  return has_packed(weight) && has_packed(weight.t());
}

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

} // namespace pelt_fast
