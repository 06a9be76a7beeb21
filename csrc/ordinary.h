// The ordinary call of an operation, from Python's arguments to its result in one step: dense CPU
// tensors of fitting shapes, one dtype (or float32 parameters over half precision), nothing between
// the caller and the kernel. What is not ordinary is no error here: Python's checks say what it is.
#pragma once

#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <string>
#include <vector>

namespace pelt_fast {

// Does a call of an operator with these arguments reach its kernel and nothing else? Not where a
// dispatch mode, a transform, a subclass, tracing, autocast or the profiler would see it.
bool is_direct(const pybind11::args& arguments);

// As functional.lora_linear, bottleneck_adapter and compacter take them, names of activations
// settled. Returns None when the call is not ordinary; y where no gradient is wanted; else the
// operands, as the autograd functions take them.
pybind11::object ordinary_lora_linear(pybind11::handle x, pybind11::handle weight,
                                      pybind11::handle bias, pybind11::handle lora_a,
                                      pybind11::handle lora_b, pybind11::handle scaling,
                                      pybind11::handle lora_bias, pybind11::handle dropout_p,
                                      bool training);
// Of a frozen weight: returns None also where the packed product would bring nothing, and True
// where it brings something and a gradient is wanted.
pybind11::object ordinary_frozen_linear(pybind11::handle x, pybind11::handle weight,
                                        pybind11::handle bias);
// torch's dropout: returns the mask, drawn as torch would; None where torch must draw it itself.
pybind11::object ordinary_dropout(pybind11::handle x, pybind11::handle p);
pybind11::object ordinary_gated_lora_linear(pybind11::handle x, pybind11::handle weight,
                                            pybind11::handle bias, pybind11::handle lora_a,
                                            pybind11::handle lora_b, pybind11::handle gate_weight,
                                            pybind11::handle gate_bias, pybind11::handle scaling,
                                            pybind11::handle dropout_p, bool training);
// What an adapter takes besides its projections.
struct AroundAdapter {
  pybind11::handle x, down_bias, up_bias;
  const std::string& activation;
  pybind11::handle scaling, gate, residual, skip, pre_weight, pre_bias, pre_eps, ln_weight, ln_bias,
      eps, dropout_p;
  bool training;
};
// The tensors of a PHM weight.
struct PhmArguments {
  pybind11::handle rule, left, right;
};
pybind11::object ordinary_adapter(pybind11::handle down, pybind11::handle up,
                                  const AroundAdapter& around);
pybind11::object ordinary_compacter(const PhmArguments& down, const PhmArguments& up,
                                    const AroundAdapter& around);
// As functional.multi_lora takes them, the plan as its arrays and numbers; with a weight (and a
// bias or None), which are multi_lora_linear's, there is no base_out. Returns None; or whether it
// was done, and then the result (a base that was changed is itself), else the operands of the
// autograd function: dropout's rate, the row scale, and a list of all A, B, bases, ranks and
// scalings.
pybind11::object ordinary_multi_lora(pybind11::handle x, pybind11::handle weight,
                                     pybind11::handle bias, pybind11::handle lora_a,
                                     pybind11::handle lora_b, pybind11::handle plan_arrays,
                                     int64_t plan_tokens, int64_t plan_adapters,
                                     pybind11::handle scaling, pybind11::handle ranks,
                                     pybind11::handle base_out, pybind11::handle row_scale,
                                     pybind11::handle dropout_p, bool training);

// As functional.multi_bottleneck takes them; None also where a gradient is wanted or something is
// dropped. What is around the projections that this adapter has not is None.
pybind11::object ordinary_multi_bottleneck(pybind11::handle down, pybind11::handle up,
                                           pybind11::handle plan_arrays, int64_t plan_tokens,
                                           int64_t plan_adapters, pybind11::handle widths,
                                           const AroundAdapter& around);

// As functional.multi_elementwise takes them; None also where a gradient is wanted.
pybind11::object ordinary_multi_elementwise(pybind11::handle x, pybind11::handle scales,
                                            pybind11::handle biases, pybind11::handle plan_arrays,
                                            int64_t plan_tokens, int64_t plan_adapters);

// What AdapterFusion's matrices were folded into, checked when they were: for this x's size, dtype
// and place.
struct FoldedMatrices {
  at::Tensor down;
  std::optional<at::Tensor> down_bias;
  at::Tensor score;
  std::optional<at::Tensor> score_bias;
  at::Tensor value;
};
// What functional.adapter_fusion takes besides them.
struct AroundFusion {
  pybind11::handle x, query;
  const std::string& activation;
  const std::vector<int64_t>& widths;
  pybind11::handle temperature, residual, skip, pre_weight, pre_bias, pre_eps, ln_weight, ln_bias,
      eps, dropout_p;
  bool training;
};
// y and the attention; None also where a gradient is wanted.
pybind11::object ordinary_fusion(const FoldedMatrices& folded, const AroundFusion& around);

} // namespace pelt_fast
