"""Who runs in a row: the layernorm alone, the adapters library, eager and compiled PyTorch, ours per backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pelt_fast
from pelt_fast import functional as PF
from pelt_fast.testing.adapter_workloads import AdapterInputs

from ..case import DTYPES
from ..contender import (
    BACKENDS,
    Contender,
    backend_in,
    compiling,
    differentiable,
    leaves_of,
    recorded,
    what_runs,
)
from .cases import ACTIVATION, BLOCKS, AdapterCase

NAMES = ("ln", "library", "eager", "compiled", "ours", *(f"ours[{name}]" for name in BACKENDS))


def draw(case: AdapterCase, device: torch.device) -> AdapterInputs:
    return case.workload.make(DTYPES[case.dtype], device)


def build(name: str, case: AdapterCase, drawn: AdapterInputs) -> Contender:
    """Raises `NotHere` with the reason when this contender has no place in this row."""
    if name == "library":
        return _library(name, case, drawn)
    if name.startswith("ours"):
        return _ours(name, case, drawn)
    names, function, ran = trained(drawn), EAGER[case.kind], "torch"
    if name == "ln":
        names, function = ("x", "skip", "ln_weight", "ln_bias"), _layernorm
    if name == "compiled":
        compiling(case)
        function, ran = torch.compile(function, dynamic=False), "inductor"
    return differentiable(name, case, drawn, names, function, ran)


def trained(inputs: AdapterInputs) -> tuple[str, ...]:
    """Everything."""
    return tuple(name for name, _ in inputs.named_tensors() if name != "dy")


# --- by hand


def _layernorm(i: AdapterInputs) -> Tensor:
    """What stands there without an adapter."""
    assert i.skip is not None
    return _after(i, i.x + i.skip)


def _bottleneck(i: AdapterInputs, h: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(h, i.down, i.down_bias)), i.up, i.up_bias)


def _before(i: AdapterInputs, z: Tensor) -> Tensor:
    return F.layer_norm(z, z.shape[-1:], i.pre_weight, i.pre_bias, i.pre_eps)


def _after(i: AdapterInputs, s: Tensor) -> Tensor:
    return F.layer_norm(s, s.shape[-1:], i.ln_weight, i.ln_bias, i.eps)


def _houlsby(i: AdapterInputs) -> Tensor:
    return _after(i, i.x + _bottleneck(i, i.x) + i.skip)


def _pfeiffer(i: AdapterInputs) -> Tensor:
    assert i.skip is not None
    return _after(i, i.x + _bottleneck(i, _before(i, i.x + i.skip)) + i.skip)


def _parallel(i: AdapterInputs) -> Tensor:
    return _after(i, i.scaling * _bottleneck(i, i.x) + i.skip + i.x)


EAGER: dict[str, Callable[[AdapterInputs], Tensor]] = {
    "houlsby": _houlsby,
    "pfeiffer": _pfeiffer,
    "parallel": _parallel,
}


# --- the library


def library_adapter(case: AdapterCase, inputs: AdapterInputs) -> nn.Module:
    """The library's own module, made by the library, holding the numbers of ``inputs``."""
    from adapters import DoubleSeqBnConfig, ParBnConfig, SeqBnConfig
    from adapters.methods.modeling import Adapter, ParallelAdapter

    d, m = case.features, case.bottleneck
    configs = {"houlsby": DoubleSeqBnConfig, "pfeiffer": SeqBnConfig, "parallel": ParBnConfig}
    config = configs[case.kind](non_linearity=ACTIVATION, scaling=inputs.scaling)
    adapter: nn.Module = (ParallelAdapter if config.is_parallel else Adapter)("row", d, m, config)
    adapter.model_norms = nn.ModuleDict(
        {"pre": nn.LayerNorm(d, inputs.pre_eps), "ln": nn.LayerNorm(d, inputs.eps)}
    )
    adapter.to(inputs.x.device, inputs.x.dtype)
    mine = dict(inputs.named_tensors())
    with torch.no_grad():
        for name, parameter in _parameters(adapter, case).items():
            parameter.copy_(mine[name])
    return adapter.train()


def _parameters(adapter: Any, case: AdapterCase) -> dict[str, Tensor]:
    """Under the names of the inputs. In a model both layernorms are one; here each has its gradient."""
    down, up, norms = adapter.adapter_down[0], adapter.adapter_up, adapter.model_norms
    found = {"down": down.weight, "down_bias": down.bias, "up": up.weight, "up_bias": up.bias}
    for name in ("pre", "ln") if BLOCKS[case.kind].get("pre_ln") else ("ln",):
        found |= {f"{name}_weight": norms[name].weight, f"{name}_bias": norms[name].bias}
    return found


def _library(name: str, case: AdapterCase, inputs: AdapterInputs) -> Contender:
    adapter: Any = library_adapter(case, inputs)
    leaves = leaves_of(inputs, ("x", "skip"))
    # output of the sub-layer, and its input, which goes around it
    o, stream = (leaves.skip, leaves.x) if case.kind == "parallel" else (leaves.x, leaves.skip)
    norms = adapter.model_norms

    def forward() -> Tensor:
        hidden, _, residual = adapter.pre_forward(o, stream, norms["pre"])
        hidden, *_ = adapter(hidden, residual)
        return adapter.post_forward(hidden, o, stream, norms["ln"])

    wrt = {"x": leaves.x, "skip": leaves.skip, **_parameters(adapter, case)}
    wrt = {key: wrt[key] for key in trained(inputs)}
    return Contender(name, leaves, recorded(case, forward), wrt, "torch", adapter)


# --- ours


def _ours(name: str, case: AdapterCase, inputs: AdapterInputs) -> Contender:
    backend = backend_in(name)
    explanation = pelt_fast.explain(
        "bottleneck_adapter", *inputs.args, **inputs.kwargs, backend=backend
    )

    def function(leaves: AdapterInputs) -> Tensor:
        return PF.bottleneck_adapter(*leaves.args, **leaves.kwargs, backend=backend)

    ran = what_runs(explanation, case)
    return differentiable(name, case, inputs, trained(inputs), function, ran)
