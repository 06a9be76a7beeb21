"""A PEFT LoRA layer as arguments of ``lora_linear``, or the reason why PEFT's own forward must run.

``kind_obstacle`` is about what a layer is made of, and holds until it is rebuilt. ``operands`` is
about one call: it reads the layer as it is at that moment. Both give the first reason they find.

``operands`` runs at every call of every layer, and each ``nn.Module.__getattr__`` costs half a
microsecond: submodules and parameters are taken from the dictionaries that hold them, and the words
of a reason are put together only when there is one.
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

Operands = dict[str, Any]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_LINEAR = (nn.Linear.forward,)
_BASE = (nn.Linear.forward, Conv1D.forward)
_DROPOUT = (nn.Dropout.forward, nn.Identity.forward)


def kind_obstacle(layer: lora.Linear) -> str | None:
    """Why no call of this layer can be served, whatever its state."""
    base = layer.base_layer
    if type(base).forward not in _BASE:
        return f"its base layer is a {_type_name(base)}, not a plain nn.Linear or Conv1D"
    obstacle = _tensor_obstacle(base.weight, "base weight")
    if obstacle is not None:
        return obstacle
    obstacles = [_adapter_obstacle(layer, name) for name in layer.lora_A]
    return obstacles[0] if obstacles and None not in obstacles else None


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
    modules = layer._modules
    base = modules["base_layer"]
    obstacle = _module_obstacle(base, _BASE, "base_layer")
    if obstacle is not None:
        return obstacle
    weight = _parameter(base, "weight")
    obstacle = _tensor_obstacle(weight, "base weight") or _input_obstacle(x, weight)
    if obstacle is not None:
        return obstacle
    autocast = x is not None and torch.is_autocast_enabled(x.device.type)

    a_by_name, b_by_name = modules["lora_A"]._modules, modules["lora_B"]._modules
    dropout_by_name = modules["lora_dropout"]._modules
    lora_a, lora_b, lora_bias, scaling, dropout_p = [], [], [], [], []
    for name in layer.active_adapters:
        if name not in a_by_name:  # active elsewhere in the model
            continue
        a_module, b_module, dropout = a_by_name[name], b_by_name[name], dropout_by_name[name]
        a, b = _parameter(a_module, "weight"), _parameter(b_module, "weight")
        b_bias, scale = _parameter(b_module, "bias"), layer.scaling[name]
        obstacle = (
            _adapter_obstacle(layer, name)
            or _module_obstacle(a_module, _LINEAR, "lora_A", name)
            or _module_obstacle(b_module, _LINEAR, "lora_B", name)
            or _module_obstacle(dropout, _DROPOUT, "lora_dropout", name)
            or _tensor_obstacle(a, "lora_A", name)
            or _tensor_obstacle(b, "lora_B", name)
            or (None if autocast else _dtype_obstacle((a, b, b_bias), weight.dtype, name))
        )
        if obstacle is not None:
            return obstacle
        if not isinstance(scale, (float, int)):
            return f"the scaling of adapter {name!r} is a {_type_name(scale)}, not a number"
        lora_a.append(a)
        lora_b.append(b)
        lora_bias.append(b_bias)
        scaling.append(scale)
        # the dropout's own mode counts, as in PEFT: it may differ from the layer's
        dropout_p.append(dropout.p if dropout.training and isinstance(dropout, nn.Dropout) else 0.0)
    if not lora_a:
        return f"the active adapter {_names(layer.active_adapters)} is not on this layer"
    return {
        # Conv1D keeps its weight as (in, out)
        "weight": weight if isinstance(base, nn.Linear) else weight.t(),
        "bias": _parameter(base, "bias"),
        "lora_a": lora_a,
        "lora_b": lora_b,
        "scaling": scaling,
        "lora_bias": lora_bias,
        "dropout_p": dropout_p,
    }


def _parameter(module: nn.Module, name: str) -> Any:
    parameters = module._parameters
    # replicas of DataParallel keep theirs as attributes
    return parameters[name] if name in parameters else getattr(module, name)


def _input_obstacle(x: Tensor | None, weight: Tensor) -> str | None:
    if x is None:
        return None
    if type(x) is not Tensor and type(x) is not nn.Parameter:
        return f"x is a {_type_name(x)}"
    if x.layout is not torch.strided or x.is_nested:
        return "x is not a dense tensor"
    if torch._C._are_functorch_transforms_active() or torch.jit.is_tracing():
        return "a torch.func transform or torch.jit.trace is active"
    if not torch.is_autocast_enabled(x.device.type):
        if x.dtype is not weight.dtype:
            return (
                f"outside autocast: x is {dtype_name(x.dtype)}, weight {dtype_name(weight.dtype)}"
            )
    elif x.dtype is torch.float64 or x.dtype not in _FLOATS:
        # autocast leaves these alone, and so takes no part in mixing them with other dtypes
        return f"x is {dtype_name(x.dtype)} under autocast"
    return None


def _adapter_obstacle(layer: lora.Linear, name: str) -> str | None:
    if name in layer.lora_variant:
        variant = _type_name(layer.lora_variant[name]).removesuffix("LinearVariant")
        return f"adapter {name!r} uses the variant {variant}"
    if layer.r[name] > MAX_RANK:
        return f"adapter {name!r} has rank {layer.r[name]}, above {MAX_RANK}"
    return None


def _module_obstacle(
    module: nn.Module, forwards: tuple[Any, ...], part: str, adapter: str | None = None
) -> str | None:
    """Why a call of ``module`` is more than what ``lora_linear`` computes in its place."""
    # looked up on the instance, which may have been given a forward of its own
    if getattr(module.forward, "__func__", None) not in forwards:
        return f"{_part(part, adapter)} has a forward of its own ({_type_name(module)})"
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):
        return f"{_part(part, adapter)} has hooks"
    if "parametrizations" in module._modules:
        return f"{_part(part, adapter)} is parametrized"
    return None


def _tensor_obstacle(tensor: Any, part: str, adapter: str | None = None) -> str | None:
    # a subclass (a DTensor, a quantized tensor) has its own idea of what a product is
    if type(tensor) is not nn.Parameter and type(tensor) is not Tensor:
        return f"{_part(part, adapter)} is a {_type_name(tensor)}"
    if tensor.dtype not in _FLOATS:
        return f"{_part(part, adapter)} is {dtype_name(tensor.dtype)}"
    if tensor.is_meta:
        return f"{_part(part, adapter)} is on the meta device"
    if tensor.dim() != 2:  # what FSDP and ZeRO leave of a parameter that is not gathered
        return f"{_part(part, adapter)} has the shape {tuple(tensor.shape)}, not a matrix's"
    return None


def _dtype_obstacle(
    tensors: Sequence[Tensor | None], dtype: torch.dtype, adapter: str
) -> str | None:
    for tensor in tensors:
        if tensor is None or tensor.dtype is dtype:
            continue
        if tensor.dtype is not torch.float32 or dtype is torch.float64:
            return (
                f"outside autocast: adapter {adapter!r} is {dtype_name(tensor.dtype)}, "
                f"weight {dtype_name(dtype)}"
            )
    return None


def _part(part: str, adapter: str | None) -> str:
    return part if adapter is None else f"{part} of adapter {adapter!r}"


def dtype_name(dtype: torch.dtype) -> str:
    """The name without ``torch.``."""
    return str(dtype).removeprefix("torch.")


def _type_name(value: Any) -> str:
    return type(value).__name__


def _names(names: Sequence[str]) -> str:
    return " + ".join(map(repr, names)) or "(none)"
