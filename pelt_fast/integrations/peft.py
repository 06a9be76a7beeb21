"""PEFT: its LoRA linear layers compute with ``pelt_fast.functional.lora_linear``.

A layer is made fast by giving it another class, a subclass of PEFT's that differs in ``forward`` alone, and restored by
giving it PEFT's back. Nothing is stored on the layer, so copies, pickles, replicas, hooks and wrappers all work on it as
they did, and no class and no global is touched.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from peft.tuners.lora import layer as lora
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..functional import explain, lora_linear
from .peft_obstacles import kind_obstacle, state_obstacle
from .report import Report

_REPORT_TOKENS = 2048  # the number of tokens for which the report names the backends


class AcceleratedLinear(lora.Linear):
    """PEFT's LoRA linear with a fast ``forward``. Instances come from ``pelt_fast.accelerate``, never from a constructor."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As ``peft.tuners.lora.Linear.forward``, which runs wherever a call is not served."""
        active = _active_adapters(self)
        if args or kwargs or state_obstacle(self, active, x) is not None:
            return super().forward(x, *args, **kwargs)
        return lora_linear(x, **_operands(self, active), training=True)


def has_layers(model: nn.Module) -> bool:
    """Whether there is any layer of PEFT's in the model."""
    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


def accelerate(model: nn.Module) -> Report:
    """Gives every LoRA linear that can be served the fast class; see ``pelt_fast.accelerate``."""
    report = Report(library="PEFT")
    inside_attention: set[nn.Module] = set()
    for name, module in model.named_modules():
        if isinstance(module, lora.MultiheadAttention):
            inside_attention.update(module.modules())
        if type(module) is AcceleratedLinear:
            report.already.append(name)
        elif isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            reason = _why_left(module, module in inside_attention)
            if reason is not None:
                report.left[name] = reason
                continue
            module.__class__ = AcceleratedLinear
            _rebind_forward(module, lora.Linear.forward, AcceleratedLinear.forward)
            report.replaced.append(name)
        else:
            continue
        active = _active_adapters(module)
        obstacle = state_obstacle(module, active)
        if obstacle is not None:
            report.waiting[name] = obstacle
        else:
            _describe_backends(module, active, report.backends)
    return report


def restore(model: nn.Module) -> int:
    """Gives every accelerated layer PEFT's class back; see ``pelt_fast.restore``."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, AcceleratedLinear)]
    for name, module in layers:
        if type(module) is not AcceleratedLinear:
            raise RuntimeError(
                f"cannot restore {name!r}: another library has made it a {type(module).__name__}; undo that first"
            )
    for _, module in layers:
        module.__class__ = lora.Linear
        _rebind_forward(module, AcceleratedLinear.forward, lora.Linear.forward)
    return len(layers)


def _active_adapters(layer: lora.Linear) -> list[str]:
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _operands(layer: lora.Linear, active: list[str]) -> dict[str, Any]:
    """The arguments of ``lora_linear`` after x: PEFT's parameters themselves, and its settings as they are now."""
    base = layer.base_layer
    lora_b = [layer.lora_B[name] for name in active]
    return {
        # Conv1D keeps its weight as (in, out)
        "weight": base.weight if isinstance(base, nn.Linear) else base.weight.t(),
        "bias": base.bias,
        "lora_a": [layer.lora_A[name].weight for name in active],
        "lora_b": [module.weight for module in lora_b],
        "scaling": [layer.scaling[name] for name in active],
        "lora_bias": [module.bias for module in lora_b],
        "dropout_p": [_dropout_p(layer.lora_dropout[name]) for name in active],
    }


def _dropout_p(module: nn.Module) -> float:
    # the mode of the dropout itself counts, as in PEFT: it may differ from the layer's
    return module.p if module.training and isinstance(module, nn.Dropout) else 0.0


def _why_left(module: nn.Module, inside_attention: bool) -> str | None:
    if isinstance(module, AuxiliaryTrainingWrapper):
        return f"it is a {type(module).__name__}, which has no LoRA"
    if type(module) is not lora.Linear:
        return f"it is a {type(module).__module__}.{type(module).__name__}, not a peft.tuners.lora.Linear"
    if inside_attention:
        return "it is part of a MultiheadAttention, which never calls it"
    forward = module.__dict__.get("forward")
    if forward is not None and not (_is_bound(forward, module) or "_old_forward" in module.__dict__):
        return "its forward was replaced on the instance"
    return kind_obstacle(module)


def _is_bound(method: Any, module: nn.Module) -> bool:
    return isinstance(method, MethodType) and method.__self__ is module and method.__func__ in _FORWARDS


_FORWARDS: tuple[Callable[..., Any], ...] = (lora.Linear.forward, AcceleratedLinear.forward)


def _rebind_forward(module: nn.Module, old: Callable[..., Any], new: Callable[..., Any]) -> None:
    """Hugging Face accelerate's hooks keep the bound method of a module's class on the module itself."""
    for key in ("forward", "_old_forward"):
        method = module.__dict__.get(key)
        if isinstance(method, MethodType) and method.__self__ is module and method.__func__ is old:
            module.__dict__[key] = MethodType(new, module)


def _describe_backends(layer: lora.Linear, active: list[str], backends: dict[str, str]) -> None:
    operands = _operands(layer, active)
    weight = operands["weight"]
    ranks = "+".join(str(a.shape[0]) for a in operands["lora_a"])
    dtype = str(weight.dtype).removeprefix("torch.")
    kind = f"{weight.shape[1]} -> {weight.shape[0]}, r = {ranks}, {dtype} on {weight.device.type}, T = {_REPORT_TOKENS}"
    if kind not in backends:
        x = torch.empty(1, 1, dtype=weight.dtype, device=weight.device).expand(_REPORT_TOKENS, weight.shape[1])
        chosen = explain("lora_linear", x, **operands, training=True).backends
        backends[kind] = "/".join(map(str, chosen))
