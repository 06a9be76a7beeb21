// Whether what something was read from, in Python, is still as it was.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/utils/pybind.h>

#include <vector>

namespace pelt_fast {

// Remembers classes and dictionaries of objects, values in dictionaries, and tensors; looks at them
// again in microseconds, where Python takes hundreds. It keeps all of them alive, so that nothing
// new can have the address of what it saw.
class Watch {
 public:
  // objects: their classes and __dict__s. entries, pairs (dictionary, key): the very object that is
  // there, or none; if that is itself a dictionary, its size too. tensors: class, dtype, sizes and
  // device; with contents also strides, address, version and, on CPUs, up to `samples` elements at
  // equal distances, which show what no version counts, such as a write through .data.
  Watch(const pybind11::list& objects, const pybind11::list& entries, const pybind11::list& tensors,
        bool contents, int64_t samples);

  // Not of inference tensors' contents, which count no versions.
  bool holds() const;

 private:
  struct Object {
    pybind11::object object, type, dict;
  };
  struct Entry {
    pybind11::object dict, key, value; // no value where there was none
    Py_ssize_t size;                   // of a dictionary, else -1
  };
  struct Content {
    std::vector<int64_t> strides;
    c10::Storage storage; // in which the address is
    const void* address = nullptr;
    int64_t version = 0;
    uint64_t hash = 0;
    bool operator==(const Content& other) const;
  };
  struct Observed {
    pybind11::object tensor, type;
    at::ScalarType dtype;
    c10::Device device;
    std::vector<int64_t> sizes;
    Content content;
  };

  Content content_of(const at::Tensor& t) const;

  bool contents_, counted_ = true;
  int64_t samples_;
  std::vector<Object> objects_;
  std::vector<Entry> entries_;
  std::vector<Observed> tensors_;
};

} // namespace pelt_fast
