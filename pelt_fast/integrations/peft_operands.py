"""A PEFT LoRA layer as arguments of ``lora_linear``, or the reason why PEFT's own forward must run.

``kind_obstacle`` is about what a layer is made of, and holds until it is rebuilt. ``operands`` is
about one call: it reads the layer as it is at that moment. Both give the first reason they find.

``operands`` runs at every call of every layer: submodules are taken from the dictionaries that hold
them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from peft.tuners.lora import layer as lora
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.pytorch_utils import Conv1D

from ..functional import MAX_RANK
from .base_layers import FastLinear
from .obstacles import (
    FLOATS,
    LINEAR,
    dtype_name,
    input_obstacle,
    is_autocast,
    mixture_obstacle,
    module_obstacle,
    parameter,
    tensor_obstacle,
    type_name,
)
from .report import Idle

Operands = dict[str, Any]

_BASE = (nn.Linear.forward, Conv1D.forward, FastLinear.forward)
_DROPOUT = (nn.Dropout.forward, nn.Identity.forward)


def kind_obstacle(layer: lora.Linear) -> str | None:
    """Why no call of this layer can be served, whatever its state."""
    base = layer.base_layer
    if type(base).forward not in _BASE:
        return f"its base layer is a {type_name(base)}, not a plain nn.Linear or Conv1D"
    weight = parameter(base, "weight")
    if weight.dtype not in FLOATS:
        return f"base weight is {dtype_name(weight.dtype)}"
    variants = {name: _variant_obstacle(layer, name) for name in layer.lora_A}
    if not variants or None in variants.values():
        return None
    return "; ".join(f"adapter {name!r}: {variant}" for name, variant in variants.items())


def operands(layer: lora.Linear, x: Tensor | None = None) -> Operands | str:
    """The arguments of ``lora_linear`` after x: PEFT's own parameters, its settings of this moment.

    Args:
        layer: the LoRA layer.
        x: its input. None asks about an input of the base weight's dtype, outside autocast.

    Returns:
        The arguments, or the reason why PEFT's forward must run.
    """
    obstacle = state_obstacle(layer, x)
    if obstacle is not None:
        return obstacle
    base = layer._modules["base_layer"]
    weight, bias = parameter(base, "weight"), parameter(base, "bias")
    autocast = is_cast(x)
    adapters = []
    for name in layer.active_adapters:
        if name in layer._modules["lora_A"]._modules:  # it may be active elsewhere in the model
            adapter = adapter_operands(layer, name, weight, autocast)
            if isinstance(adapter, str):
                return f"adapter {name!r}: {adapter}"
            adapters.append(adapter)
    if not adapters:
        return Idle(f"the active adapter {_names(layer.active_adapters)} is not on this layer")
    lora_a, lora_b, lora_bias, scaling, dropout_p = zip(*adapters, strict=True)
    return {
        # Conv1D keeps its weight as (in, out)
        "weight": weight if isinstance(base, nn.Linear) else weight.t(),
        "bias": bias,
        "lora_a": lora_a,
        "lora_b": lora_b,
        "scaling": scaling,
        "lora_bias": lora_bias,
        "dropout_p": dropout_p,
    }


def state_obstacle(layer: lora.Linear, x: Tensor | None) -> str | None:
    """Why no adapter of the layer can be served at this moment; x as ``operands`` takes it."""
    if layer._disable_adapters:
        return "its adapters are disabled"
    if layer.merged_adapters:
        return f"adapter {_names(layer.merged_adapters)} is merged into the base weight"
    if not layer.cast_input_dtype_enabled:
        return "the cast of its input is disabled"
    if _has_any_global_hook():
        return "a global module hook is registered"
    base = layer._modules["base_layer"]
    weight, bias = parameter(base, "weight"), parameter(base, "bias")
    autocast = is_cast(x)
    obstacle = (
        module_obstacle(base, _BASE, "base_layer")
        or tensor_obstacle(weight, "base weight")
        or _input_obstacle(x, weight, autocast)
    )
    if obstacle is None and bias is not None and bias.dtype is not weight.dtype and not autocast:
        return f"base bias is {dtype_name(bias.dtype)}, base weight {dtype_name(weight.dtype)}"
    return obstacle


def is_cast(x: Any) -> bool:
    """Whether autocast is on where x is."""
    return isinstance(x, Tensor) and is_autocast(x.device.type)


def adapter_operands(
    layer: lora.Linear, name: str, weight: Tensor, autocast: bool
) -> tuple[Tensor, Tensor, Tensor | None, float, float] | str:
    """lora_a, lora_b, lora_bias, scaling and dropout_p of one adapter, or the reason against it."""
    modules = layer._modules
    a_module, b_module = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
    dropout, scaling = modules["lora_dropout"]._modules[name], layer.scaling[name]
    obstacle = (
        _variant_obstacle(layer, name)
        or module_obstacle(a_module, LINEAR, "lora_A")
        or module_obstacle(b_module, LINEAR, "lora_B")
        or module_obstacle(dropout, _DROPOUT, "lora_dropout")
    )
    if obstacle is not None:
        return obstacle
    lora_a, lora_b = parameter(a_module, "weight"), parameter(b_module, "weight")
    lora_bias = parameter(b_module, "bias")
    obstacle = tensor_obstacle(lora_a, "lora_A") or tensor_obstacle(lora_b, "lora_B")
    for tensor in (lora_a, lora_b, lora_bias):
        if obstacle is None and tensor is not None:
            obstacle = mixture_obstacle(tensor, weight, "base weight", autocast)
    if obstacle is not None:
        return obstacle
    if parameter(a_module, "bias") is not None:
        return "lora_A has a bias"
    if lora_a.shape[0] > MAX_RANK:
        return f"rank {lora_a.shape[0]} is above {MAX_RANK}"
    if not isinstance(scaling, (float, int)) or not math.isfinite(scaling):
        return f"scaling is {scaling!r}, not a finite number"
    if not isinstance(dropout, nn.Dropout):
        return lora_a, lora_b, lora_bias, scaling, 0.0
    if dropout.inplace:
        return "lora_dropout works in place"
    # the dropout's own mode counts, as in PEFT: it may differ from the layer's
    return lora_a, lora_b, lora_bias, scaling, dropout.p if dropout.training else 0.0


def _input_obstacle(x: Tensor | None, weight: Tensor, autocast: bool) -> str | None:
    if x is None:
        return None
    obstacle = input_obstacle(x, autocast)
    if obstacle is None and x.dtype is not weight.dtype and not autocast:
        return f"x is {dtype_name(x.dtype)}, base weight {dtype_name(weight.dtype)}"
    return obstacle


def _variant_obstacle(layer: lora.Linear, name: str) -> str | None:
    if name not in layer.lora_variant:
        return None
    return f"variant {type_name(layer.lora_variant[name]).removesuffix('LinearVariant')}"


def _names(names: Sequence[str]) -> str:
    return " + ".join(map(repr, names)) or "(none)"
