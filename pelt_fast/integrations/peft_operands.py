"""A PEFT LoRA layer as arguments of ``lora_linear``, or the reason why PEFT's own forward must run.

``kind_obstacle`` is about what a layer is made of, and holds until it is rebuilt. ``operands`` is
about one call: it reads the layer as it is at that moment. Both give the first reason they find.

``operands`` runs at every call of every layer, and each ``nn.Module.__getattr__`` costs half a
microsecond: submodules and parameters are taken from the dictionaries that hold them, and the words
of a reason are put together only when there is one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import layer as lora
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.pytorch_utils import Conv1D

from ..functional import MAX_RANK

Operands = dict[str, Any]

_AUTOCAST = (torch.float32, torch.bfloat16, torch.float16)
_FLOATS = (*_AUTOCAST, torch.float64)
_LINEAR = (nn.Linear.forward,)
_BASE = (nn.Linear.forward, Conv1D.forward)
_DROPOUT = (nn.Dropout.forward, nn.Identity.forward)


def kind_obstacle(layer: lora.Linear) -> str | None:
    """Why no call of this layer can be served, whatever its state."""
    base = layer.base_layer
    if type(base).forward not in _BASE:
        return f"its base layer is a {_type_name(base)}, not a plain nn.Linear or Conv1D"
    weight = _parameter(base, "weight")
    if weight.dtype not in _FLOATS:
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
    if layer._disable_adapters:
        return "its adapters are disabled"
    if layer.merged_adapters:
        return f"adapter {_names(layer.merged_adapters)} is merged into the base weight"
    if not layer.cast_input_dtype_enabled:
        return "the cast of its input is disabled"
    if _has_any_global_hook():
        return "a global module hook is registered"
    base = layer._modules["base_layer"]
    weight, bias = _parameter(base, "weight"), _parameter(base, "bias")
    autocast = isinstance(x, Tensor) and _is_autocast(x.device.type)
    obstacle = (
        _module_obstacle(base, _BASE, "base_layer")
        or _tensor_obstacle(weight, "base weight")
        or _input_obstacle(x, weight, autocast)
    )
    if obstacle is not None:
        return obstacle
    if bias is not None and bias.dtype is not weight.dtype and not autocast:
        return f"base bias is {dtype_name(bias.dtype)}, base weight {dtype_name(weight.dtype)}"
    adapters = []
    for name in layer.active_adapters:
        if name in layer._modules["lora_A"]._modules:  # it may be active elsewhere in the model
            adapter = _adapter(layer, name, weight, autocast)
            if isinstance(adapter, str):
                return f"adapter {name!r}: {adapter}"
            adapters.append(adapter)
    if not adapters:
        return f"the active adapter {_names(layer.active_adapters)} is not on this layer"
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


def _adapter(
    layer: lora.Linear, name: str, weight: Tensor, autocast: bool
) -> tuple[Tensor, Tensor, Tensor | None, float, float] | str:
    """lora_a, lora_b, lora_bias, scaling and dropout_p of one adapter, or the reason against it."""
    modules = layer._modules
    a_module, b_module = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
    dropout, scaling = modules["lora_dropout"]._modules[name], layer.scaling[name]
    obstacle = (
        _variant_obstacle(layer, name)
        or _module_obstacle(a_module, _LINEAR, "lora_A")
        or _module_obstacle(b_module, _LINEAR, "lora_B")
        or _module_obstacle(dropout, _DROPOUT, "lora_dropout")
    )
    if obstacle is not None:
        return obstacle
    lora_a, lora_b = _parameter(a_module, "weight"), _parameter(b_module, "weight")
    lora_bias = _parameter(b_module, "bias")
    obstacle = (
        _tensor_obstacle(lora_a, "lora_A")
        or _tensor_obstacle(lora_b, "lora_B")
        or _mixture_obstacle((lora_a, lora_b, lora_bias), weight, autocast)
    )
    if obstacle is not None:
        return obstacle
    if _parameter(a_module, "bias") is not None:
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


def _parameter(module: nn.Module, name: str) -> Any:
    parameters = module._parameters
    # replicas of DataParallel keep theirs as attributes
    return parameters[name] if name in parameters else getattr(module, name, None)


def _is_autocast(device_type: str) -> bool:
    # asking about a device that has no autocast, such as meta, raises
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def _input_obstacle(x: Tensor | None, weight: Tensor, autocast: bool) -> str | None:
    if x is None:
        return None
    if type(x) is not Tensor and type(x) is not nn.Parameter:
        return f"x is a {_type_name(x)}"
    if x.layout is not torch.strided or x.is_nested:
        return "x is not a dense tensor"
    if torch._C._are_functorch_transforms_active() or torch.jit.is_tracing():
        return "a torch.func transform or torch.jit.trace is active"
    if autocast:
        # autocast casts no others, and so does not mend their mixing
        return None if x.dtype in _AUTOCAST else f"x is {dtype_name(x.dtype)} under autocast"
    if x.dtype is not weight.dtype:
        return f"x is {dtype_name(x.dtype)}, base weight {dtype_name(weight.dtype)}"
    return None


def _variant_obstacle(layer: lora.Linear, name: str) -> str | None:
    if name not in layer.lora_variant:
        return None
    return f"variant {_type_name(layer.lora_variant[name]).removesuffix('LinearVariant')}"


def _module_obstacle(module: nn.Module, forwards: tuple[Any, ...], part: str) -> str | None:
    """Why a call of ``module`` is more than what ``lora_linear`` computes in its place."""
    # looked up on the instance, which may have been given a forward of its own
    if getattr(module.forward, "__func__", None) not in forwards:
        return f"{part} has a forward of its own ({_type_name(module)})"
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):
        return f"{part} has hooks"
    if "parametrizations" in module._modules:
        return f"{part} is parametrized"
    return None


def _tensor_obstacle(tensor: Any, part: str) -> str | None:
    # a subclass (a DTensor, a quantized tensor) has its own idea of what a product is
    if type(tensor) is not nn.Parameter and type(tensor) is not Tensor:
        return f"{part} is a {_type_name(tensor)}"
    if tensor.dtype not in _FLOATS:
        return f"{part} is {dtype_name(tensor.dtype)}"
    if tensor.is_meta:
        return f"{part} is on the meta device"
    if tensor.dim() != 2:  # what FSDP and ZeRO leave of a parameter that is not gathered
        return f"{part} has the shape {tuple(tensor.shape)}, not a matrix's"
    return None


def _mixture_obstacle(
    tensors: Sequence[Tensor | None], weight: Tensor, autocast: bool
) -> str | None:
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device != weight.device:
            return f"it is on {tensor.device}, base weight on {weight.device}"
        if tensor.dtype is weight.dtype or autocast:
            continue
        if tensor.dtype is not torch.float32 or weight.dtype is torch.float64:
            dtypes = f"it is {dtype_name(tensor.dtype)}, base weight {dtype_name(weight.dtype)}"
            return f"outside autocast: {dtypes}"
    return None


def dtype_name(dtype: torch.dtype) -> str:
    """The name without ``torch.``."""
    return str(dtype).removeprefix("torch.")


def _type_name(value: Any) -> str:
    return type(value).__name__


def _names(names: Sequence[str]) -> str:
    return " + ".join(map(repr, names)) or "(none)"
