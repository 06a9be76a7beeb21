"""Checks that every public function shares; an error names the argument, what came and what was expected."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..dispatch import asked_for, check_name
from ..segments import MultiAdapterPlan

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HALVES = (torch.bfloat16, torch.float16)
_NUMBERS = (float, int, torch.SymFloat, torch.SymInt, Real)  # Real: NumPy's scalars


def check_input(x: Any, last: str) -> None:
    """x is a dense tensor (..., ``last``) of at least one dimension."""
    if not isinstance(x, Tensor):
        raise TypeError(
            f"x is a {type(x).__name__}; expected a torch.Tensor of shape (..., {last})"
        )
    if x.layout is not torch.strided or x.is_nested:
        raise TypeError(f"x is {_layout(x)}; expected a dense tensor of shape (..., {last})")
    if x.dim() == 0:
        raise ValueError(f"x has no dimension; expected shape (..., {last})")


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast wants x to be; None where it is off or leaves x alone."""
    device_type = x.device.type
    may_cast = x.dtype in DTYPES and x.dtype != torch.float64 and device_type != "meta"
    if may_cast and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def check_input_dtype(x: Tensor) -> None:
    """x has a dtype that is computed in."""
    if x.dtype not in DTYPES:
        raise TypeError(f"x has dtype {x.dtype}; expected float32, bfloat16, float16 or float64")


def check_tensor(name: str, value: Any, x: Tensor, shape: str) -> None:
    """``value`` is a dense tensor where x is."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name} is a {type(value).__name__}; expected a torch.Tensor of shape {shape}"
        )
    if value.layout is not torch.strided or value.is_nested:
        raise TypeError(f"{name} is {_layout(value)}; expected a dense tensor of shape {shape}")
    if value.device != x.device:
        raise ValueError(f"{name} is on {value.device}; expected {x.device}, where x is")


def check_vector(name: str, value: Tensor, symbol: str, size: int) -> None:
    """``value`` has shape (size,), which is called (symbol,)."""
    if value.dim() != 1 or value.shape[0] != size:
        raise ValueError(f"{name} has shape {shape_of(value)}; expected ({symbol},) = ({size},)")


def check_dtype(name: str, value: Tensor, x: Tensor, autocast: bool, *, wider: bool) -> None:
    """``value`` has x's dtype; ``wider``: or float32 over a half; under autocast any floating one."""
    dtype = value.dtype
    if dtype == x.dtype:
        return
    if autocast:
        if dtype not in DTYPES:
            raise TypeError(
                f"{name} has dtype {dtype}; expected a floating dtype of {', '.join(map(str, DTYPES))}"
            )
        return
    if wider and x.dtype in HALVES:
        if dtype == torch.float32:
            return
        raise TypeError(
            f"{name} has dtype {dtype}; expected {x.dtype}, x's dtype, or torch.float32"
        )
    raise TypeError(f"{name} has dtype {dtype}; expected {x.dtype}, x's dtype")


def served(parameter: Tensor, x: Tensor) -> Tensor:
    """In a dtype that kernels take: x's, or float32 over a half. Under autocast it may come in another."""
    wider = parameter.dtype == torch.float32 and x.dtype in HALVES
    return parameter if wider else parameter.to(x.dtype)


def check_plan(plan: Any, x: Tensor, adapters: int) -> None:
    """``plan`` is one of x's rows and of as many adapters as are stacked."""
    if not isinstance(plan, MultiAdapterPlan):
        raise TypeError(f"plan is a {type(plan).__name__}; expected a pelt_fast.MultiAdapterPlan")
    if plan.num_adapters != adapters:
        raise ValueError(
            f"plan is of {plan.num_adapters} adapters; expected {adapters}, as many as are stacked"
        )
    rows = math.prod(x.shape[:-1])
    if plan.tokens != rows:
        raise ValueError(f"plan is of {plan.tokens} tokens; expected {rows}, x's rows")
    if plan.device != x.device:
        raise ValueError(f"plan is on {plan.device}; expected {x.device}, where x is")


def number(name: str, value: Any, expected: str = "a number") -> float:
    """``value`` as a float; symbolic ones are let through."""
    if isinstance(value, bool) or not isinstance(value, _NUMBERS):
        raise TypeError(f"{name} is a {type(value).__name__}; expected {expected}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} is too large for a float; expected a finite number") from None


def check_finite(name: str, value: float) -> None:
    """``value`` is neither infinite nor NaN."""
    # math.isfinite would break a graph where the value is symbolic
    if not -float("inf") < value < float("inf"):
        raise ValueError(f"{name} is {value}; expected a finite number")


def check_factor(name: str, value: float, dtype: torch.dtype) -> None:
    """``value`` is finite in ``dtype``."""
    check_finite(name, value)
    most = torch.finfo(dtype).max
    if not -most <= value <= most:
        raise ValueError(f"{name} is {value}; expected a number that {dtype} holds")


def check_there(name: str, value: Tensor) -> None:
    """The memory of ``value`` was not freed (``resize_(0)``, as FSDP does): torch's own kernels do not look."""
    if torch.compiler.is_compiling():
        return
    if value.numel() and value.device.type != "meta" and not value.untyped_storage().size():
        raise ValueError(f"{name} of shape {shape_of(value)} has no memory: its storage was freed")


def check_probability(name: str, value: float) -> None:
    """``value`` is in [0, 1]."""
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} is {value}; expected a probability between 0 and 1")


def backend_name(backend: str | None) -> str:
    """A backend, "auto", or "" in a graph that is being compiled: then what was asked for is read when it runs."""
    if backend is not None:
        return check_name(backend)
    return "" if torch.compiler.is_compiling() else asked_for()


def tensors(name: str, value: Any) -> Sequence[Tensor]:
    """One tensor or several, as a sequence."""
    if isinstance(value, Tensor):
        return (value,)
    if isinstance(value, (list, tuple)):
        return value
    raise TypeError(
        f"{name} is a {type(value).__name__}; expected a torch.Tensor or a list or tuple of them"
    )


def shape_of(value: Tensor) -> str:
    """The shape as a person writes it."""
    return str(tuple(value.shape))


def _layout(value: Tensor) -> str:
    return "a nested tensor" if value.is_nested else f"of layout {value.layout}"
