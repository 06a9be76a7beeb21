"""What a PEFT LoRA layer can ask for that the LoRA linear does not compute: there PEFT's own forward must run.

``kind_obstacle`` is about what a layer is made of and holds until it is rebuilt; ``state_obstacle`` is about the state of
the moment, and is asked at every call. Each gives the first reason found, or None.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import layer as lora
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.pytorch_utils import Conv1D

from ..functional import MAX_RANK

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_LINEAR_FORWARD = (nn.Linear.forward,)
_BASE_FORWARD = (nn.Linear.forward, Conv1D.forward)
_DROPOUT_FORWARD = (nn.Dropout.forward, nn.Identity.forward)


def kind_obstacle(layer: lora.Linear) -> str | None:
    """Why no call of this layer can be served, whatever its state."""
    base = layer.base_layer
    if type(base).forward not in _BASE_FORWARD:
        return f"its base layer is a {_type_name(base)}, not a plain nn.Linear or Conv1D"
    reason = _tensor_obstacle("its base weight", base.weight)
    if reason is not None:
        return reason
    if len(layer.lora_A) > 0:
        reasons = [_adapter_kind_obstacle(layer, name) for name in layer.lora_A]
        if None not in reasons:
            return reasons[0]
    return None


def state_obstacle(layer: lora.Linear, active: Sequence[str], x: Tensor | None = None) -> str | None:
    """Why a call with ``x`` and the ``active`` adapters of this layer is not served now.

    Without ``x``: why a call with an x in the dtype of the base weight, outside autocast, is not.
    """
    if layer._disable_adapters:
        return "its adapters are disabled"
    if layer.merged_adapters:
        return f"adapter {_names(layer.merged_adapters)} is merged into the base weight"
    if not active:
        return f"the active adapter {_names(layer.active_adapters)} is not on this layer"
    if not layer.cast_input_dtype_enabled:
        return "input dtype casting is disabled"
    if _has_any_global_hook():
        return "a global module hook is registered"
    base = layer.base_layer
    reason = _inner_obstacle("base_layer", base, _BASE_FORWARD) or _tensor_obstacle("its base weight", base.weight)
    if reason is not None:
        return reason
    for name in active:
        reason = _adapter_obstacle(layer, name)
        if reason is not None:
            return reason
    weight = base.weight
    if x is None:
        return _dtype_obstacle(layer, active, weight.dtype)
    if type(x) is not Tensor and type(x) is not nn.Parameter:
        return f"x is a {_type_name(x)}"
    if x.layout is not torch.strided or x.is_nested:
        return "x is not a dense tensor"
    if torch._C._are_functorch_transforms_active():
        return "a torch.func transform is active"
    if torch.is_autocast_enabled(x.device.type):
        # autocast leaves fp64 alone, and then takes no part in mixing it with other dtypes
        return "x is fp64 under autocast" if x.dtype is torch.float64 else None
    if x.dtype is not weight.dtype:
        return f"x is {_dtype_name(x.dtype)} over a {_dtype_name(weight.dtype)} base weight, outside autocast"
    return _dtype_obstacle(layer, active, x.dtype)


def _adapter_kind_obstacle(layer: lora.Linear, name: str) -> str | None:
    if name in layer.lora_variant:
        return f"adapter {name!r} uses the variant {_variant_name(layer.lora_variant[name])}"
    for part, module in (("lora_A", layer.lora_A[name]), ("lora_B", layer.lora_B[name])):
        if type(module).forward not in _LINEAR_FORWARD:
            return f"{part} of adapter {name!r} is a {_type_name(module)}, not a plain nn.Linear"
    return None


def _adapter_obstacle(layer: lora.Linear, name: str) -> str | None:
    if name in layer.lora_variant:
        return f"adapter {name!r} uses the variant {_variant_name(layer.lora_variant[name])}"
    lora_a, lora_b, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    scaling = layer.scaling[name]
    if lora_a.weight.shape[0] > MAX_RANK:
        return f"adapter {name!r} has rank {lora_a.weight.shape[0]}, above {MAX_RANK}"
    if not isinstance(scaling, (float, int)):
        return f"the scaling of adapter {name!r} is a {_type_name(scaling)}, not a number"
    if lora_a.bias is not None:
        return f"lora_A of adapter {name!r} has a bias"
    if getattr(dropout, "inplace", False):
        return f"the dropout of adapter {name!r} works in place"
    return (
        _inner_obstacle("lora_dropout", dropout, _DROPOUT_FORWARD)
        or _inner_obstacle("lora_A", lora_a, _LINEAR_FORWARD)
        or _inner_obstacle("lora_B", lora_b, _LINEAR_FORWARD)
        or _tensor_obstacle(f"lora_A of adapter {name!r}", lora_a.weight)
        or _tensor_obstacle(f"lora_B of adapter {name!r}", lora_b.weight)
    )


def _inner_obstacle(name: str, module: nn.Module, forwards: tuple[Any, ...]) -> str | None:
    """Why calling ``module`` does more than the one computation that the LoRA linear would do in its place."""
    # bound to the instance, so that a forward put on the instance is seen too
    if getattr(module.forward, "__func__", None) not in forwards:
        return f"the forward of {name} is not that of a plain layer ({_type_name(module)})"
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):
        return f"{name} has hooks"
    if "parametrizations" in module._modules:
        return f"{name} is parametrized"
    return None


def _tensor_obstacle(what: str, tensor: Any) -> str | None:
    # a subclass (DTensor, a quantized tensor) has its own idea of what a product is
    if type(tensor) is not nn.Parameter and type(tensor) is not Tensor:
        return f"{what} is a {_type_name(tensor)}"
    if tensor.dtype not in _FLOATS:
        return f"{what} is {_dtype_name(tensor.dtype)}"
    if tensor.is_meta:
        return f"{what} is on the meta device"
    if tensor.dim() != 2:  # a shard of FSDP1 or ZeRO-3 outside of its gathering
        return f"{what} has the shape {tuple(tensor.shape)}, not that of a matrix"
    return None


def _dtype_obstacle(layer: lora.Linear, active: Sequence[str], dtype: torch.dtype) -> str | None:
    for name in active:
        lora_b = layer.lora_B[name]
        for part in (layer.lora_A[name].weight, lora_b.weight, lora_b.bias):
            if part is None or part.dtype is dtype:
                continue
            if part.dtype is not torch.float32 or dtype is torch.float64:
                return f"outside autocast: adapter {name!r} is {_dtype_name(part.dtype)} over a {_dtype_name(dtype)} base"
    return None


def _variant_name(variant: Any) -> str:
    return type(variant).__name__.removesuffix("LinearVariant")


def _type_name(value: Any) -> str:
    return type(value).__name__


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _names(names: Sequence[str]) -> str:
    return " + ".join(map(repr, names)) or "(none)"
