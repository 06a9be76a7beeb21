// Reads the arguments of an ordinary call: what `ordinary.h` calls so.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/utils/pybind.h>

#include <vector>

#include "check.h"

namespace pelt_fast {

// Nothing in this thread sees operators on their way to a kernel.
bool nothing_between();

// A tensor of torch's own class whose data is in the CPU's memory.
bool is_plain(const at::Tensor& t);

bool wants_grad(const at::Tensor& t);

// Reads arguments; the first one that is not ordinary settles it.
class Reader {
 public:
  bool ordinary = true, gradient = false;

  explicit Reader(pybind11::handle x);

  const at::Tensor& x() const { return *x_; }
  void refuse() { ordinary = false; }
  void expect(bool condition) { ordinary = ordinary && condition; }

  // A tensor of x's dtype, or, where wider is true, of float32 over half precision.
  const at::Tensor* tensor(pybind11::handle h, bool wider);
  const at::Tensor* matrix(pybind11::handle h, int64_t rows, int64_t columns, bool wider);
  OptionalTensor vector(pybind11::handle h, int64_t size, bool wider);
  // None where it is not as large as x.
  OptionalTensor like_x(pybind11::handle h);
  double number(pybind11::handle h);
  double probability(pybind11::handle h);
  // Plain, its memory there; notes whether it wants a gradient.
  bool is_there(const at::Tensor& t);
  double epsilon(pybind11::handle h);

 private:
  const at::Tensor* plain(pybind11::handle h);

  static bool has_memory(const at::Tensor& t);

  const at::Tensor* x_ = nullptr;
  bool half_ = false;
};

// One, or a list or tuple of them.
std::vector<pybind11::handle> several(pybind11::handle h);
bool is_list(pybind11::handle h);
pybind11::tuple tuple_of(const std::vector<pybind11::handle>& items);

constexpr int64_t kMaxRank = 256; // of pelt_fast/functional/lora.py

} // namespace pelt_fast
