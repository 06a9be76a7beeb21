"""Why a call cannot be served, asked of one module or one tensor: what every integration has to know.

The functions give a reason, or None. They run at every call of every layer, and each
``nn.Module.__getattr__`` costs half a microsecond: parameters are taken from the dictionaries that
hold them, and the words of a reason are put together only when there is one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

AUTOCAST = (torch.float32, torch.bfloat16, torch.float16)
FLOATS = (*AUTOCAST, torch.float64)
LINEAR = (nn.Linear.forward,)


def parameter(module: nn.Module, name: str) -> Any:
    """The parameter of that name, or None."""
    parameters = module._parameters
    # replicas of DataParallel keep theirs as attributes
    return parameters[name] if name in parameters else getattr(module, name, None)


def is_autocast(device_type: str) -> bool:
    """Whether autocast is on for the device."""
    # asking about a device that has no autocast, such as meta, raises
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def input_obstacle(x: Any, autocast: bool, part: str = "x") -> str | None:
    """Why an activation is not one that a fused call takes."""
    if type(x) is not Tensor and type(x) is not nn.Parameter:
        return f"{part} is a {type_name(x)}"
    if x.layout is not torch.strided or x.is_nested:
        return f"{part} is not a dense tensor"
    if torch._C._are_functorch_transforms_active() or torch.jit.is_tracing():
        return "a torch.func transform or torch.jit.trace is active"
    if x.dtype in (AUTOCAST if autocast else FLOATS):
        return None
    # autocast casts no others, and so does not mend their mixing
    return f"{part} is {dtype_name(x.dtype)}{' under autocast' if autocast else ''}"


def module_obstacle(module: nn.Module, forwards: tuple[Any, ...], part: str) -> str | None:
    """Why a call of ``module`` is more than what a fused call computes in its place."""
    # looked up on the instance, which may have been given a forward of its own
    if getattr(module.forward, "__func__", None) not in forwards:
        return f"{part} has a forward of its own ({type_name(module)})"
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


def tensor_obstacle(tensor: Any, part: str, dimensions: int = 2) -> str | None:
    """Why a weight is not an ordinary matrix of floats, or a stack of them."""
    # a subclass (a DTensor, a quantized tensor) has its own idea of what a product is
    if type(tensor) is not nn.Parameter and type(tensor) is not Tensor:
        return f"{part} is a {type_name(tensor)}"
    if tensor.dtype not in FLOATS:
        return f"{part} is {dtype_name(tensor.dtype)}"
    if tensor.is_meta:
        return f"{part} is on the meta device"
    if tensor.dim() != dimensions:  # what FSDP and ZeRO leave of a parameter that is not gathered
        return f"{part} has the shape {tuple(tensor.shape)}, not a matrix's"
    return None


def mixture_obstacle(tensor: Tensor, base: Tensor, part: str, autocast: bool) -> str | None:
    """Why a parameter does not go with ``base``, the tensor that says device and dtype."""
    if tensor.device != base.device:
        return f"it is on {tensor.device}, {part} on {base.device}"
    if tensor.dtype is base.dtype or autocast:
        return None
    if tensor.dtype is not torch.float32 or base.dtype is torch.float64:
        dtypes = f"it is {dtype_name(tensor.dtype)}, {part} {dtype_name(base.dtype)}"
        return f"outside autocast: {dtypes}"
    return None


def dtype_name(dtype: torch.dtype) -> str:
    """The name without ``torch.``."""
    return str(dtype).removeprefix("torch.")


def type_name(value: Any) -> str:
    """The class's name."""
    return type(value).__name__
