#include "reader.h"

#include <ATen/EmptyTensor.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/profiler/api.h>

#include <cmath>

#include "ordinary.h"

namespace py = pybind11;

namespace pelt_fast {

bool nothing_between() {
  const auto keys = c10::impl::tls_local_dispatch_key_set();
  return (keys.included_ - c10::default_included_set).empty() &&
         !at::autocast::is_autocast_enabled(at::kCPU) &&
         at::impl::PythonTorchFunctionTLS::stack_len() == 0 &&
         !torch::profiler::impl::profilerEnabled();
}

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

Reader::Reader(py::handle x) {
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

const at::Tensor* Reader::tensor(py::handle h, bool wider) {
  const at::Tensor* t = ordinary ? plain(h) : nullptr;
  if (t && t->scalar_type() != x_->scalar_type())
    expect(wider && half_ && t->scalar_type() == at::kFloat);
  return ordinary ? t : nullptr;
}

const at::Tensor* Reader::matrix(py::handle h, int64_t rows, int64_t columns, bool wider) {
  const at::Tensor* t = tensor(h, wider);
  if (t)
    expect(t->dim() == 2 && (rows < 0 || t->size(0) == rows) && t->size(1) == columns &&
           t->numel() > 0);
  return ordinary ? t : nullptr;
}

OptionalTensor Reader::vector(py::handle h, int64_t size, bool wider) {
  if (h.is_none()) return {};
  const at::Tensor* t = tensor(h, wider);
  if (t) expect(t->dim() == 1 && t->size(0) == size);
  return ordinary ? OptionalTensor(*t) : OptionalTensor();
}

OptionalTensor Reader::like_x(py::handle h) {
  const at::Tensor* t = tensor(h, false);
  if (t) expect(t->sizes() == x_->sizes());
  return ordinary ? OptionalTensor(*t) : OptionalTensor();
}

double Reader::number(py::handle h) {
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

double Reader::probability(py::handle h) {
  const double p = number(h);
  expect(p >= 0 && p <= 1);
  return p;
}

bool Reader::is_there(const at::Tensor& t) {
  if (!is_plain(t) || t._fw_grad(0).defined() || !has_memory(t)) return false;
  gradient = gradient || wants_grad(t);
  return true;
}

double Reader::epsilon(py::handle h) {
  const double eps = number(h);
  expect(eps >= 0);
  return eps;
}

const at::Tensor* Reader::plain(py::handle h) {
  if (!THPVariable_CheckExact(h.ptr())) return refuse(), nullptr;
  const at::Tensor& t = THPVariable_Unpack(h.ptr());
  if (!is_there(t)) return refuse(), nullptr;
  return &t;
}

bool Reader::has_memory(const at::Tensor& t) {
  const size_t needed = at::detail::computeStorageNbytes(t.sizes(), t.strides(), t.itemsize(),
                                                         size_t(t.storage_offset()));
  return needed <= t.storage().nbytes();
}

std::vector<py::handle> several(py::handle h) {
  if (!PyList_CheckExact(h.ptr()) && !PyTuple_CheckExact(h.ptr())) return {h};
  std::vector<py::handle> items;
  for (py::handle item : py::reinterpret_borrow<py::sequence>(h)) items.push_back(item);
  return items;
}

bool is_list(py::handle h) {
  return PyList_CheckExact(h.ptr()) || PyTuple_CheckExact(h.ptr());
}

py::tuple tuple_of(const std::vector<py::handle>& items) {
  py::tuple out(items.size());
  for (size_t i = 0; i < items.size(); ++i) out[i] = py::reinterpret_borrow<py::object>(items[i]);
  return out;
}

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

} // namespace pelt_fast
