#include "watch.h"

#include <ATen/EmptyTensor.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <cstring>

#include "check.h"

namespace py = pybind11;

namespace pelt_fast {
namespace {

py::object type_of(py::handle h) {
  return py::reinterpret_borrow<py::object>(reinterpret_cast<PyObject*>(Py_TYPE(h.ptr())));
}

py::object dict_of(py::handle h) {
  PyObject* dict = PyObject_GenericGetDict(h.ptr(), nullptr);
  if (!dict) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(dict);
}

// Borrowed; null where there is none.
PyObject* value_in(py::handle dict, py::handle key) {
  PyObject* value = PyDict_GetItemWithError(dict.ptr(), key.ptr());
  if (!value && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

Py_ssize_t size_of(PyObject* value) {
  return value && PyDict_Check(value) ? PyDict_Size(value) : -1;
}

// Of words at a distance of `step` bytes, in lanes that do not wait for each other.
template <class Word>
uint64_t hash_of(const char* from, int64_t bytes, int64_t step) {
  uint64_t lanes[4] = {1, 2, 3, 4};
  const auto mix = [&](uint64_t& lane, int64_t at) {
    Word word;
    std::memcpy(&word, from + at, sizeof word);
    lane = (lane ^ word) * 0xD6E8FEB86659FD93ull;
    lane ^= lane >> 32;
  };
  int64_t at = 0;
  for (; at + 3 * step < bytes; at += 4 * step)
    for (int i = 0; i < 4; ++i) mix(lanes[i], at + i * step);
  for (; at < bytes; at += step) mix(lanes[0], at);
  uint64_t hash = 0;
  for (uint64_t lane : lanes) hash = (hash ^ lane) * 0x9E3779B97F4A7C15ull ^ (hash >> 29);
  return hash;
}

// Of elements at equal distances in the tensor's memory, at most `samples`.
uint64_t hash_of(const at::Tensor& t, int64_t samples) {
  const size_t needed = at::detail::computeStorageNbytes(t.sizes(), t.strides(), t.itemsize(),
                                                         size_t(t.storage_offset()));
  if (t.numel() == 0 || needed > t.storage().nbytes()) return 0;
  int64_t extent = 1;
  for (int64_t i = 0; i < t.dim(); ++i) extent += (t.size(i) - 1) * t.stride(i);
  const int64_t width = t.itemsize(), bytes = extent * width, step = (extent / samples + 1) * width;
  const char* const from = static_cast<const char*>(t.const_data_ptr());
  if (width == 4) return hash_of<uint32_t>(from, bytes, step);
  if (width == 2) return hash_of<uint16_t>(from, bytes, step);
  return width == 8 ? hash_of<uint64_t>(from, bytes, step) : hash_of<uint8_t>(from, bytes, step);
}

} // namespace

bool Watch::Content::operator==(const Content& other) const {
  return address == other.address && version == other.version && hash == other.hash &&
         strides == other.strides;
}

Watch::Content Watch::content_of(const at::Tensor& t) const {
  const auto strides = t.strides();
  return {{strides.begin(), strides.end()},
          t.storage(),
          t.const_data_ptr(),
          t.is_inference() ? 0 : int64_t(t._version()),
          t.is_cpu() ? hash_of(t, samples_) : 0};
}

Watch::Watch(const py::list& objects, const py::list& entries, const py::list& tensors,
             bool contents, int64_t samples)
    : contents_(contents), samples_(samples) {
  TORCH_CHECK_VALUE(samples > 0, "samples is ", samples, "; expected at least 1");
  for (py::handle h : objects)
    objects_.push_back({py::reinterpret_borrow<py::object>(h), type_of(h), dict_of(h)});
  for (py::handle h : entries) {
    const auto [dict, key] = py::cast<std::pair<py::object, py::object>>(h);
    if (!PyDict_Check(dict.ptr())) throw py::type_error("entries has what is in no dict");
    PyObject* value = value_in(dict, key);
    entries_.push_back({dict, key, py::reinterpret_borrow<py::object>(value), size_of(value)});
  }
  for (py::handle h : tensors) {
    if (!THPVariable_Check(h.ptr())) throw py::type_error("tensors has what is no tensor");
    const at::Tensor& t = THPVariable_Unpack(h.ptr());
    counted_ = counted_ && !(contents && t.is_inference());
    tensors_.push_back({py::reinterpret_borrow<py::object>(h), type_of(h), t.scalar_type(),
                        t.device(), t.sizes().vec(), contents ? content_of(t) : Content()});
  }
}

bool Watch::holds() const {
  if (!counted_) return false;
  for (const Object& o : objects_)
    if (!type_of(o.object).is(o.type) || !dict_of(o.object).is(o.dict)) return false;
  for (const Entry& e : entries_) {
    PyObject* value = value_in(e.dict, e.key);
    if (value != e.value.ptr() || size_of(value) != e.size) return false;
  }
  for (const Observed& seen : tensors_) {
    const at::Tensor& t = THPVariable_Unpack(seen.tensor.ptr());
    if (!type_of(seen.tensor).is(seen.type) || t.scalar_type() != seen.dtype ||
        t.device() != seen.device || t.sizes() != at::IntArrayRef(seen.sizes))
      return false;
    if (contents_ && !(content_of(t) == seen.content)) return false;
  }
  return true;
}

} // namespace pelt_fast
