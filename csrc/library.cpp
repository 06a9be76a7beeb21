// The module pelt_fast._C. Schemas of the operators stand in pelt_fast/ops; what is bound here is
// one backend of them.
#include <torch/csrc/utils/pybind.h>

#include "cpu/adapter.h"
#include "cpu/compacter.h"
#include "cpu/delta.h"
#include "cpu/dropout.h"
#include "cpu/fusion.h"
#include "cpu/gated_lora.h"
#include "cpu/isa.h"
#include "cpu/lora.h"
#include "cpu/memory.h"
#include "cpu/multi_bottleneck.h"
#include "cpu/multi_elementwise.h"
#include "cpu/multi_lora.h"
#include "cpu/packed.h"
#include "cpu/prefix.h"
#include "cpu/shape.h"
#include "ordinary.h"
#include "watch.h"

namespace py = pybind11;

namespace {

using pelt_fast::from_rows;
using pelt_fast::to_rows;

pelt_fast::OptionalTensor to_rows(const pelt_fast::OptionalTensor& t) {
  return t ? pelt_fast::OptionalTensor(to_rows(*t)) : t;
}
pelt_fast::OptionalTensor from_rows(const pelt_fast::OptionalTensor& t, const at::Tensor& like) {
  return t ? pelt_fast::OptionalTensor(from_rows(*t, like)) : t;
}

auto lora_linear_fwd(const at::Tensor& x, const at::Tensor& weight,
                     const pelt_fast::OptionalTensor& bias, const std::vector<at::Tensor>& lora_a,
                     const std::vector<at::Tensor>& lora_b,
                     const std::vector<pelt_fast::OptionalTensor>& lora_bias,
                     const std::vector<double>& scaling, const std::vector<double>& dropout_p,
                     const pelt_fast::OptionalTensor& seed) {
  auto [y, s] = pelt_fast::lora_linear_fwd(to_rows(x), weight, bias, lora_a, lora_b, lora_bias,
                                           scaling, dropout_p, seed);
  return std::make_tuple(from_rows(y, x), s);
}

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
    g = pelt_fast::lora_linear_bwd(to_rows(dy), to_rows(x), weight, lora_a, lora_b, s, scaling,
                                   dropout_p, seed, need_dx, need_dbias, need_da, need_db,
                                   need_dlora_bias);
    g.dx = from_rows(g.dx, dy);
  }
  return py::make_tuple(g.dx, g.dbias, g.da, g.db, g.dlora_bias);
}

// What both directions of the gated LoRA linear take.
#define PELT_GATED_ARGUMENTS                                                                     \
  const at::Tensor &lora_a, const at::Tensor &lora_b, const at::Tensor &gate_weight,             \
      const pelt_fast::OptionalTensor &gate_bias, const pelt_fast::OptionalTensor &token_weight, \
      double scaling, double dropout_p, const pelt_fast::OptionalTensor &seed
#define PELT_GATED_CALL \
  {lora_a, lora_b, gate_weight, gate_bias, token_weight, scaling, dropout_p, seed}

auto gated_lora_linear_fwd(const at::Tensor& x, const at::Tensor& weight,
                           const pelt_fast::OptionalTensor& bias, PELT_GATED_ARGUMENTS,
                           int64_t samples) {
  auto [y, s, gate] =
      pelt_fast::gated_lora_linear_fwd(to_rows(x), weight, bias, PELT_GATED_CALL, samples);
  return std::make_tuple(from_rows(y, x), s, gate);
}

auto gated_lora_linear_bwd(const at::Tensor& dy, const pelt_fast::OptionalTensor& x,
                           const at::Tensor& weight, PELT_GATED_ARGUMENTS, const at::Tensor& s,
                           const at::Tensor& gate, const std::vector<bool>& needs) {
  auto grads = pelt_fast::gated_lora_linear_bwd(to_rows(dy), to_rows(x), weight, PELT_GATED_CALL, s,
                                                gate, needs);
  grads[0] = from_rows(grads[0], dy);
  return grads;
}

// What both directions of the bottleneck adapter take, in the order of the operators' schemas.
#define PELT_ADAPTER_ARGUMENTS                                                                     \
  const at::Tensor &down, const pelt_fast::OptionalTensor &down_bias, const at::Tensor &up,        \
      const pelt_fast::OptionalTensor &up_bias, const pelt_fast::OptionalTensor &scale,            \
      const pelt_fast::OptionalTensor &gate, const pelt_fast::OptionalTensor &pre_weight,          \
      const pelt_fast::OptionalTensor &pre_bias, const pelt_fast::OptionalTensor &ln_weight,       \
      const pelt_fast::OptionalTensor &ln_bias, const pelt_fast::OptionalTensor &seed,             \
      const std::string &activation, double scaling, double pre_eps, double eps, double dropout_p, \
      bool skip_in, bool residual_x, bool residual_skip
#define PELT_ADAPTER_TENSORS \
  {{down_bias, up_bias, scale, gate, pre_weight, pre_bias, ln_weight, ln_bias, seed}, down, up}
#define PELT_ADAPTER_SETTINGS \
  {activation, scaling, pre_eps, eps, dropout_p, skip_in, residual_x, residual_skip}

auto bottleneck_adapter_fwd(const at::Tensor& x, const pelt_fast::OptionalTensor& skip,
                            PELT_ADAPTER_ARGUMENTS) {
  auto [y, q, pre_stats, post_stats] = pelt_fast::bottleneck_adapter_fwd(
      to_rows(x), to_rows(skip), PELT_ADAPTER_TENSORS, PELT_ADAPTER_SETTINGS);
  return std::make_tuple(from_rows(y, x), q, pre_stats, post_stats);
}

auto bottleneck_adapter_bwd(const at::Tensor& dy, const at::Tensor& x,
                            const pelt_fast::OptionalTensor& skip, const at::Tensor& q,
                            const pelt_fast::OptionalTensor& pre_stats,
                            const pelt_fast::OptionalTensor& post_stats, PELT_ADAPTER_ARGUMENTS,
                            const std::vector<bool>& needs) {
  auto grads = pelt_fast::bottleneck_adapter_bwd(to_rows(dy), to_rows(x), to_rows(skip), q,
                                                 pre_stats, post_stats, PELT_ADAPTER_TENSORS,
                                                 PELT_ADAPTER_SETTINGS, needs);
  grads[0] = from_rows(grads[0], dy);
  grads[1] = from_rows(grads[1], dy);
  return grads;
}

// What both directions of the Compacter adapter take.
#define PELT_COMPACTER_ARGUMENTS                                                                   \
  const at::Tensor &down_rule, const at::Tensor &down_left, const at::Tensor &down_right,          \
      const pelt_fast::OptionalTensor &down_bias, const at::Tensor &up_rule,                       \
      const at::Tensor &up_left, const at::Tensor &up_right,                                       \
      const pelt_fast::OptionalTensor &up_bias, const pelt_fast::OptionalTensor &scale,            \
      const pelt_fast::OptionalTensor &gate, const pelt_fast::OptionalTensor &pre_weight,          \
      const pelt_fast::OptionalTensor &pre_bias, const pelt_fast::OptionalTensor &ln_weight,       \
      const pelt_fast::OptionalTensor &ln_bias, const pelt_fast::OptionalTensor &seed,             \
      const std::string &activation, double scaling, double pre_eps, double eps, double dropout_p, \
      bool skip_in, bool residual_x, bool residual_skip
#define PELT_COMPACTER_TENSORS                                                         \
  {                                                                                    \
    {down_bias, up_bias, scale, gate, pre_weight, pre_bias, ln_weight, ln_bias, seed}, \
        {down_rule, down_left, down_right}, {                                          \
      up_rule, up_left, up_right                                                       \
    }                                                                                  \
  }

auto compacter_fwd(const at::Tensor& x, const pelt_fast::OptionalTensor& skip,
                   PELT_COMPACTER_ARGUMENTS) {
  auto [y, q, pre_stats, post_stats] = pelt_fast::compacter_fwd(
      to_rows(x), to_rows(skip), PELT_COMPACTER_TENSORS, PELT_ADAPTER_SETTINGS);
  return std::make_tuple(from_rows(y, x), q, pre_stats, post_stats);
}

auto compacter_bwd(const at::Tensor& dy, const at::Tensor& x, const pelt_fast::OptionalTensor& skip,
                   const at::Tensor& q, const pelt_fast::OptionalTensor& pre_stats,
                   const pelt_fast::OptionalTensor& post_stats, PELT_COMPACTER_ARGUMENTS,
                   const std::vector<bool>& needs) {
  auto grads =
      pelt_fast::compacter_bwd(to_rows(dy), to_rows(x), to_rows(skip), q, pre_stats, post_stats,
                               PELT_COMPACTER_TENSORS, PELT_ADAPTER_SETTINGS, needs);
  grads[0] = from_rows(grads[0], dy);
  grads[1] = from_rows(grads[1], dy);
  return grads;
}

// What functional.bottleneck_adapter and functional.compacter take from their activation on.
#define PELT_AROUND_ARGUMENTS                                                              \
  const std::string &activation, py::handle scaling, py::handle gate, py::handle residual, \
      py::handle skip, py::handle pre_weight, py::handle pre_bias, py::handle pre_eps,     \
      py::handle ln_weight, py::handle ln_bias, py::handle eps, py::handle dropout_p,      \
      bool training
#define PELT_AROUND                                                            \
  {x,          down_bias, up_bias, activation, scaling, gate, residual,  skip, \
   pre_weight, pre_bias,  pre_eps, ln_weight,  ln_bias, eps,  dropout_p, training}

py::object ordinary_adapter(py::handle x, py::handle down, py::handle down_bias, py::handle up,
                            py::handle up_bias, PELT_AROUND_ARGUMENTS) {
  return pelt_fast::ordinary_adapter(down, up, PELT_AROUND);
}

py::object ordinary_compacter(py::handle x, py::handle down_rule, py::handle down_left,
                              py::handle down_right, py::handle down_bias, py::handle up_rule,
                              py::handle up_left, py::handle up_right, py::handle up_bias,
                              PELT_AROUND_ARGUMENTS) {
  return pelt_fast::ordinary_compacter({down_rule, down_left, down_right},
                                       {up_rule, up_left, up_right}, PELT_AROUND);
}

// What both directions of AdapterFusion take.
#define PELT_FUSION_ARGUMENTS                                                                 \
  const at::Tensor &x, const pelt_fast::OptionalTensor &skip,                                 \
      const pelt_fast::OptionalTensor &query, const at::Tensor &down,                         \
      const pelt_fast::OptionalTensor &down_bias, const at::Tensor &score,                    \
      const pelt_fast::OptionalTensor &score_bias, const at::Tensor &value,                   \
      const pelt_fast::OptionalTensor &pre_weight, const pelt_fast::OptionalTensor &pre_bias, \
      const pelt_fast::OptionalTensor &ln_weight, const pelt_fast::OptionalTensor &ln_bias,   \
      const pelt_fast::OptionalTensor &seed, const std::string &activation,                   \
      const std::vector<int64_t>&widths, double temperature, double pre_eps, double eps,      \
      double dropout_p, bool skip_in, bool residual_x, bool residual_skip
#define PELT_FUSION_TENSORS                                                 \
  {{down_bias, {}, {}, {}, pre_weight, pre_bias, ln_weight, ln_bias, seed}, \
   down,                                                                    \
   score,                                                                   \
   score_bias,                                                              \
   value}
#define PELT_FUSION_SETTINGS \
  {activation, widths, temperature, pre_eps, eps, dropout_p, skip_in, residual_x, residual_skip}

py::tuple adapter_fusion_fwd(PELT_FUSION_ARGUMENTS) {
  std::pair<at::Tensor, pelt_fast::FusionSaved> found;
  {
    py::gil_scoped_release release;
    found =
        pelt_fast::adapter_fusion_fwd(x, skip, query, PELT_FUSION_TENSORS, PELT_FUSION_SETTINGS);
  }
  const auto& [y, saved] = found;
  return py::make_tuple(y, saved.q, saved.k, saved.p, saved.pre_stats, saved.post_stats);
}

auto adapter_fusion_bwd(const at::Tensor& dy, const at::Tensor& q, const at::Tensor& k,
                        const at::Tensor& p, const pelt_fast::OptionalTensor& pre_stats,
                        const pelt_fast::OptionalTensor& post_stats, PELT_FUSION_ARGUMENTS,
                        const std::vector<bool>& needs) {
  return pelt_fast::adapter_fusion_bwd(dy, {q, k, p, pre_stats, post_stats}, x, skip, query,
                                       PELT_FUSION_TENSORS, PELT_FUSION_SETTINGS, needs);
}

py::object ordinary_fusion(const at::Tensor& down, const pelt_fast::OptionalTensor& down_bias,
                           const at::Tensor& score, const pelt_fast::OptionalTensor& score_bias,
                           const at::Tensor& value, const std::vector<int64_t>& widths,
                           py::handle x, py::handle query, const std::string& activation,
                           py::handle temperature, py::handle residual, py::handle skip,
                           py::handle pre_weight, py::handle pre_bias, py::handle pre_eps,
                           py::handle ln_weight, py::handle ln_bias, py::handle eps,
                           py::handle dropout_p, bool training) {
  return pelt_fast::ordinary_fusion(
      {down, down_bias, score, score_bias, value},
      {x, query, activation, widths, temperature, residual, skip, pre_weight, pre_bias, pre_eps,
       ln_weight, ln_bias, eps, dropout_p, training});
}

// What both directions of batched multi-LoRA take after their own tensors.
#define PELT_MULTI_ARGUMENTS                                                             \
  const std::vector<at::Tensor>&plan, const std::vector<at::Tensor>&ranks,               \
      const std::vector<at::Tensor>&scaling, const pelt_fast::OptionalTensor &row_scale, \
      double dropout_p, const pelt_fast::OptionalTensor &seed
#define PELT_MULTI_CALL \
  pelt_fast::multi_lora_of(x, lora_a, lora_b, plan, ranks, scaling, row_scale, dropout_p, seed)

// inplace: base is changed, as rows.
py::tuple multi_lora_fwd(const at::Tensor& x, const std::vector<at::Tensor>& lora_a,
                         const std::vector<at::Tensor>& lora_b,
                         const std::vector<pelt_fast::OptionalTensor>& base, PELT_MULTI_ARGUMENTS,
                         bool inplace) {
  pelt_fast::MultiLoRAOutput out;
  {
    py::gil_scoped_release release;
    std::vector<pelt_fast::OptionalTensor> rows;
    for (const auto& b : base) rows.push_back(to_rows(b));
    out = pelt_fast::multi_lora_fwd(to_rows(x), rows, PELT_MULTI_CALL, inplace);
    for (auto& y : out.y) y = inplace ? y : from_rows(y, x);
  }
  return py::make_tuple(out.y, out.s);
}

py::tuple multi_lora_bwd(const std::vector<at::Tensor>& dy, const at::Tensor& x,
                         const std::vector<at::Tensor>& lora_a,
                         const std::vector<at::Tensor>& lora_b, const at::Tensor& s,
                         PELT_MULTI_ARGUMENTS, bool need_dx, bool need_da, bool need_db,
                         bool need_drow_scale) {
  pelt_fast::MultiLoRAGradients g;
  {
    py::gil_scoped_release release;
    std::vector<at::Tensor> rows;
    for (const auto& d : dy) rows.push_back(to_rows(d));
    g = pelt_fast::multi_lora_bwd(rows, to_rows(x), s, PELT_MULTI_CALL, need_dx, need_da, need_db,
                                  need_drow_scale);
    g.dx = from_rows(g.dx, x);
  }
  return py::make_tuple(g.dx, g.da, g.db, g.drow_scale);
}

py::tuple multi_lora_linear_fwd(const at::Tensor& x, const at::Tensor& weight,
                                const pelt_fast::OptionalTensor& bias,
                                const std::vector<at::Tensor>& lora_a,
                                const std::vector<at::Tensor>& lora_b, PELT_MULTI_ARGUMENTS) {
  pelt_fast::MultiLoRAOutput out;
  {
    py::gil_scoped_release release;
    out = pelt_fast::multi_lora_linear_fwd(to_rows(x), weight, bias, PELT_MULTI_CALL);
    out.y[0] = from_rows(out.y[0], x);
  }
  return py::make_tuple(out.y[0], out.s);
}

py::tuple multi_lora_linear_bwd(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight,
                                const std::vector<at::Tensor>& lora_a,
                                const std::vector<at::Tensor>& lora_b, const at::Tensor& s,
                                PELT_MULTI_ARGUMENTS, bool need_dx, bool need_da, bool need_db,
                                bool need_drow_scale) {
  pelt_fast::MultiLoRAGradients g;
  {
    py::gil_scoped_release release;
    g = pelt_fast::multi_lora_bwd({to_rows(dy)}, to_rows(x), s, PELT_MULTI_CALL, need_dx, need_da,
                                  need_db, need_drow_scale, weight);
    g.dx = from_rows(g.dx, x);
  }
  return py::make_tuple(g.dx, g.da, g.db, g.drow_scale);
}

// What both directions of batched bottleneck adapters take.
#define PELT_MULTI_BOTTLENECK_ARGUMENTS                                                     \
  const at::Tensor &down, const pelt_fast::OptionalTensor &down_bias, const at::Tensor &up, \
      const pelt_fast::OptionalTensor &up_bias, const pelt_fast::OptionalTensor &scale,     \
      const pelt_fast::OptionalTensor &gate, const pelt_fast::OptionalTensor &ln_weight,    \
      const pelt_fast::OptionalTensor &ln_bias, const std::vector<at::Tensor>&plan,         \
      const at::Tensor &widths, const pelt_fast::OptionalTensor &seed,                      \
      const std::string &activation, double scaling, double eps, double dropout_p, bool residual_x
#define PELT_MULTI_BOTTLENECK_CALL                                         \
  {down, up,     down_bias, up_bias,    scale,   gate, ln_weight, ln_bias, \
   plan, widths, seed,      activation, scaling, eps,  dropout_p, residual_x}

py::object ordinary_multi_bottleneck(py::handle x, py::handle down, py::handle down_bias,
                                     py::handle up, py::handle up_bias, py::handle plan_arrays,
                                     int64_t plan_tokens, int64_t plan_adapters,
                                     const std::string& activation, py::handle scaling,
                                     py::handle widths, py::handle gate, py::handle residual,
                                     py::handle ln_weight, py::handle ln_bias, py::handle eps,
                                     py::handle dropout_p, bool training) {
  const py::none none;
  return pelt_fast::ordinary_multi_bottleneck(
      down, up, plan_arrays, plan_tokens, plan_adapters, widths,
      {x, down_bias, up_bias, activation, scaling, gate, residual, none, none, none, none,
       ln_weight, ln_bias, eps, dropout_p, training});
}

auto multi_bottleneck_fwd(const at::Tensor& x, const pelt_fast::OptionalTensor& residual,
                          PELT_MULTI_BOTTLENECK_ARGUMENTS) {
  auto [y, q, stats] =
      pelt_fast::multi_bottleneck_fwd(to_rows(x), to_rows(residual), PELT_MULTI_BOTTLENECK_CALL);
  return std::make_tuple(from_rows(y, x), q, stats);
}

auto multi_bottleneck_bwd(const at::Tensor& dy, const at::Tensor& x,
                          const pelt_fast::OptionalTensor& residual, const at::Tensor& q,
                          const pelt_fast::OptionalTensor& stats, PELT_MULTI_BOTTLENECK_ARGUMENTS,
                          const std::vector<bool>& needs) {
  auto grads = pelt_fast::multi_bottleneck_bwd(to_rows(dy), to_rows(x), to_rows(residual), q, stats,
                                               PELT_MULTI_BOTTLENECK_CALL, needs);
  grads[0] = from_rows(grads[0], dy);
  grads[1] = from_rows(grads[1], dy);
  return grads;
}

} // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.doc() = "C++ kernels of pelt_fast";
  m.def("lora_linear_fwd", &lora_linear_fwd, release());
  m.def("lora_linear_bwd", &lora_linear_bwd);
  m.def("gated_lora_linear_fwd", &gated_lora_linear_fwd, release());
  m.def("gated_lora_linear_bwd", &gated_lora_linear_bwd, release());
  m.def("multi_lora_fwd", &multi_lora_fwd, py::arg("x"), py::arg("lora_a"), py::arg("lora_b"),
        py::arg("base"), py::arg("plan"), py::arg("ranks"), py::arg("scaling"),
        py::arg("row_scale"), py::arg("dropout_p"), py::arg("seed"), py::arg("inplace") = false);
  m.def("multi_lora_bwd", &multi_lora_bwd);
  m.def("multi_lora_linear_fwd", &multi_lora_linear_fwd);
  m.def("multi_lora_linear_bwd", &multi_lora_linear_bwd);
  m.def("multi_bottleneck_fwd", &multi_bottleneck_fwd, release());
  m.def("multi_bottleneck_bwd", &multi_bottleneck_bwd, release());
  m.def("bottleneck_adapter_fwd", &bottleneck_adapter_fwd, release());
  m.def("bottleneck_adapter_bwd", &bottleneck_adapter_bwd, release());
  m.def("adapter_fusion_fwd", &adapter_fusion_fwd);
  m.def("adapter_fusion_bwd", &adapter_fusion_bwd, release());
  m.def("fingerprint_of", &pelt_fast::fingerprint_of,
        "What identifies tensors and their contents; None where nothing does.", release());
  m.def("compacter_fwd", &compacter_fwd, release());
  m.def("compacter_bwd", &compacter_bwd, release());
  m.def("diff_pruning_fwd", &pelt_fast::diff_pruning_fwd, release());
  m.def("diff_pruning_bwd", &pelt_fast::diff_pruning_bwd, release());
  m.def("masking_fwd", &pelt_fast::masking_fwd, release());
  m.def("masking_bwd", &pelt_fast::masking_bwd, release());
  m.def("multi_elementwise_fwd", &pelt_fast::multi_elementwise_fwd, release());
  m.def("multi_elementwise_bwd", &pelt_fast::multi_elementwise_bwd, release());
  m.def("is_direct", &pelt_fast::is_direct);
  m.def("ordinary_lora_linear", &pelt_fast::ordinary_lora_linear);
  m.def("ordinary_frozen_linear", &pelt_fast::ordinary_frozen_linear);
  m.def("ordinary_dropout", &pelt_fast::ordinary_dropout);
  m.def("masked", &pelt_fast::masked, release());
  m.def("ordinary_adapter", &ordinary_adapter);
  m.def("ordinary_compacter", &ordinary_compacter);
  m.def("ordinary_fusion", &ordinary_fusion);
  m.def("ordinary_gated_lora_linear", &pelt_fast::ordinary_gated_lora_linear);
  m.def("ordinary_multi_bottleneck", &ordinary_multi_bottleneck);
  m.def("ordinary_multi_elementwise", &pelt_fast::ordinary_multi_elementwise);
  m.def("ordinary_multi_lora", &pelt_fast::ordinary_multi_lora);
  py::class_<pelt_fast::Watch>(m, "Watch", "Whether what something was read from is as it was.")
      .def(py::init<py::list, py::list, py::list, bool, int64_t>(), py::arg("objects"),
           py::arg("entries"), py::arg("tensors"), py::arg("contents"), py::arg("samples"))
      .def("holds", &pelt_fast::Watch::holds);
  m.def("prefix_attention", &pelt_fast::prefix_attention, release());
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
  m.def("pooled_bytes", &pelt_fast::pooled_bytes, "Freed memory kept for later outputs.",
        release());
  m.def("clear_pool", &pelt_fast::clear_pool, "Gives the kept memory back.", release());
  m.def("set_pool_limit", &pelt_fast::set_pool_limit,
        "Most bytes of freed memory to keep; 0 keeps none.", py::arg("bytes"), release());
}
