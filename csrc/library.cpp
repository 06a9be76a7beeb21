// The module pelt_fast._C. Schemas of the operators stand in pelt_fast/ops; what is bound here is
// one backend of them.
#include <torch/csrc/utils/pybind.h>

#include "cpu/isa.h"
#include "cpu/lora.h"
#include "cpu/packed.h"

namespace py = pybind11;

namespace {

py::tuple lora_linear_bwd(const at::Tensor& dy, const pelt_fast::OptionalTensor& x,
                          const at::Tensor& weight, const std::vector<at::Tensor>& lora_a,
                          const std::vector<at::Tensor>& lora_b, const pelt_fast::OptionalTensor& s,
                          const std::vector<double>& scaling, const std::vector<double>& dropout_p,
                          const pelt_fast::OptionalTensor& seed, bool need_dx, bool need_dbias,
                          const std::vector<bool>& need_da, const std::vector<bool>& need_db,
                          const std::vector<bool>& need_dlora_bias) {
  pelt_fast::LoRAGradients g;
  {
    py::gil_scoped_release release;
    g = pelt_fast::lora_linear_bwd(dy, x, weight, lora_a, lora_b, s, scaling, dropout_p, seed,
                                   need_dx, need_dbias, need_da, need_db, need_dlora_bias);
  }
  return py::make_tuple(g.dx, g.dbias, g.da, g.db, g.dlora_bias);
}

} // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.doc() = "C++ kernels of pelt_fast";
  m.def("lora_linear_fwd", &pelt_fast::lora_linear_fwd, release());
  m.def("lora_linear_bwd", &lora_linear_bwd);
  m.def(
      "isa", [] { return pelt_fast::isa_name(pelt_fast::current_isa()); },
      "The instruction set in use.");
  m.def("available_isas", &pelt_fast::available_isas, "Those this machine can run, lowest first.");
  m.def("set_isa", &pelt_fast::set_isa, "Uses this instruction set from the next call on.",
        py::arg("name"));
  m.def("packed_bytes", &pelt_fast::packed_bytes, "Memory that packed weights take.", release());
  m.def("clear_packed", &pelt_fast::clear_packed, "Forgets every packed weight.", release());
  m.def("set_packed_limit", &pelt_fast::set_packed_limit,
        "Most bytes that packed weights may take; 0 keeps none.", py::arg("bytes"), release());
}
