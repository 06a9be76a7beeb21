#include "cpu/dropout.h"
#include "ordinary.h"
#include "reader.h"

namespace py = pybind11;

namespace pelt_fast {

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

} // namespace pelt_fast
