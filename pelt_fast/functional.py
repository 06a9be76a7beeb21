"""What a user calls with tensors. Arguments are checked here, once; below, shapes and dtypes are right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .autograd import LoRALinearFunction
from .dispatch import Explanation, asked_for, check_name, explain_problem
from .ops.lora import problem_of
from .random import new_seed, philox_mask

__all__ = ["explain", "lora_linear", "philox_mask"]

MAX_RANK = 256
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_NUMBERS = (float, int, torch.SymFloat, torch.SymInt, Real)  # Real: NumPy's scalars
_HALVES = (torch.bfloat16, torch.float16)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | Sequence[Tensor],
    lora_b: Tensor | Sequence[Tensor],
    scaling: float | Sequence[float],
    *,
    lora_bias: Tensor | Sequence[Tensor | None] | None = None,
    dropout_p: float | Sequence[float] = 0.0,
    training: bool = False,
    backend: str | None = None,
) -> Tensor:
    r"""The LoRA linear, ``y = x Wᵀ + b + Σᵢ scalingᵢ · (dropᵢ(x) Aᵢᵀ Bᵢᵀ + lora_biasᵢ)``.

    Semantics of ``peft.tuners.lora.Linear``, except that x is never cast up to a wider adapter's dtype: A and B are
    cast to x's dtype, products accumulate in fp32 (fp64 for fp64), and gradients return in the parameters' own dtypes.
    Several adapters are summed; each has its own rank, scaling and dropout mask.

    Args:
        x: (..., in), one to many dimensions, any strides; float32, bfloat16, float16 or float64: the dtype that is
            computed in. Under ``torch.autocast`` x is cast to the autocast dtype first (float64 is not).
        weight: (out, in), any strides, x's dtype (under autocast any floating dtype). Meant to be frozen: a kernel may
            keep a packed copy. One that requires a gradient gets it, on the ``torch`` backend.
        bias: (out,) or None, weight's dtype.
        lora_a: (r, in), or a sequence of them, one per active adapter; 1 <= r <= 256; x's dtype, or float32 over a
            bfloat16 or float16 x.
        lora_b: (out, r) each, as lora_a.
        scaling: alpha / r, a finite number each.
        lora_bias: (out,) or None each, a bias of B, scaled as PEFT scales it.
        dropout_p: probability in [0, 1] each that an element of x is dropped on its way into A.
        training: dropout acts only when True.
        backend: "auto", "torch", "cpp", "triton", "cuda" or "reference"; None: what ``use_backend`` or
            ``PELT_FAST_BACKEND`` says. Naming one that cannot run raises ``BackendUnavailable`` with its reasons.

    Returns:
        y of shape (..., out) in the dtype that was computed in.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: an argument has a wrong shape, device or value.
        BackendUnavailable: the named backend cannot run this call.
        RuntimeError: in a backward of the backward, which has no formula here.
    """
    call = _check(x, weight, bias, lora_a, lora_b, scaling, lora_bias, dropout_p, training, backend)
    seed = new_seed(call.x.device) if any(call.dropout_p) else None
    return LoRALinearFunction.apply(
        call.x,
        weight,
        bias,
        seed,
        call.scaling,
        call.dropout_p,
        call.backend,
        *call.lora_a,
        *call.lora_b,
        *call.lora_bias,
    )


def explain(op: str, *args: Any, **kwargs: Any) -> Explanation:
    """Which backend a call would run on, forward and backward, and why not the others.

    Args:
        op: "lora_linear".
        *args: the arguments of the function of that name in ``pelt_fast.functional``; nothing is computed.
        **kwargs: likewise.

    Returns:
        An ``Explanation``; ``str()`` of it is the report.
    """
    if op != "lora_linear":
        raise ValueError(f"op={op!r} is not known; expected 'lora_linear'")
    call = _explain_lora_linear(*args, **kwargs)
    tokens = math.prod(call.x.shape[:-1])
    return Explanation(
        tuple(
            explain_problem(
                problem_of(name, call.x, call.weight, call.lora_a, call.dropout_p, tokens),
                call.backend,
            )
            for name in ("lora_linear_fwd", "lora_linear_bwd")
        )
    )


class _Call(NamedTuple):
    """The arguments of ``lora_linear``, checked, with one entry per adapter."""

    x: Tensor
    weight: Tensor
    lora_a: Sequence[Tensor]
    lora_b: Sequence[Tensor]
    lora_bias: Sequence[Tensor | None]
    scaling: tuple[float, ...]
    dropout_p: tuple[float, ...]
    backend: str


def _explain_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Any,
    lora_b: Any,
    scaling: Any,
    *,
    lora_bias: Any = None,
    dropout_p: Any = 0.0,
    training: bool = False,
    backend: str | None = None,
) -> _Call:
    return _check(x, weight, bias, lora_a, lora_b, scaling, lora_bias, dropout_p, training, backend)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Any,
    lora_b: Any,
    scaling: Any,
    lora_bias: Any,
    dropout_p: Any,
    training: bool,
    backend: str | None,
) -> _Call:
    x, autocast = _compute_input(x)
    _check_base(x, weight, bias, autocast)
    lora_a = _tensors("lora_a", lora_a)
    n = len(lora_a)
    if n == 0:
        raise ValueError("lora_a is empty; expected at least one adapter")
    lora_b = _tensors("lora_b", lora_b)
    _check_count("lora_b", lora_b, n)
    for i in range(n):
        _check_adapter(i if n > 1 else None, x, weight, lora_a[i], lora_b[i], autocast)
    numbers = _numbers("scaling", scaling, n)
    for value in numbers:
        if (
            not -math.inf < value < math.inf
        ):  # math.isfinite would break a graph where scaling is symbolic
            raise ValueError(f"scaling is {value}; expected a finite number")
    rates = _numbers("dropout_p", dropout_p, n)
    for value in rates:
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"dropout_p is {value}; expected a probability between 0 and 1")
    if not training:
        rates = (0.0,) * n
    return _Call(
        x,
        weight,
        lora_a,
        lora_b,
        _check_lora_bias(lora_bias, n, x, weight, autocast),
        numbers,
        rates,
        _backend_name(weight, backend),
    )


def _backend_name(weight: Tensor, backend: str | None) -> str:
    """A backend, "auto", or "" in a graph that is being compiled: then what was asked for is read when it runs."""
    compiling = torch.compiler.is_compiling()
    inherited = "" if compiling else asked_for()
    name = inherited if backend is None else check_name(backend)
    trains = weight.requires_grad and (compiling or torch.is_grad_enabled())
    if trains and name in ("", "auto"):
        return "torch"  # a packed copy of a weight that trains would be stale at every step
    return name


def _compute_input(x: Tensor) -> tuple[Tensor, bool]:
    """x in the dtype that is computed in, and whether autocast chose it."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x is a {type(x).__name__}; expected a torch.Tensor of shape (..., in)")
    if x.layout is not torch.strided or x.is_nested:
        raise TypeError(f"x is {_layout(x)}; expected a dense tensor of shape (..., in)")
    if x.dim() == 0:
        raise ValueError("x has no dimension; expected shape (..., in)")
    device_type = x.device.type
    may_cast = x.dtype in _DTYPES and x.dtype != torch.float64 and device_type != "meta"
    if may_cast and torch.is_autocast_enabled(device_type):
        return x.to(torch.get_autocast_dtype(device_type)), True
    if x.dtype not in _DTYPES:
        raise TypeError(f"x has dtype {x.dtype}; expected float32, bfloat16, float16 or float64")
    return x, False


def _check_base(x: Tensor, weight: Tensor, bias: Tensor | None, autocast: bool) -> None:
    _check_tensor("weight", weight, x, "(out, in)")
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"weight has shape {_shape(weight)}; expected (out, in) with in = {x.shape[-1]}, x's last size"
        )
    if weight.shape[0] == 0 or weight.shape[1] == 0:
        raise ValueError(
            f"weight has shape {_shape(weight)}; expected at least one row and one column"
        )
    _check_dtype("weight", weight, x, autocast, wider=False)
    if bias is not None:
        _check_tensor("bias", bias, x, "(out,)")
        _check_vector("bias", bias, weight)
        _check_dtype("bias", bias, x, autocast, wider=False)


def _check_adapter(
    i: int | None, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, autocast: bool
) -> None:
    at = "" if i is None else f"[{i}]"
    out_features, in_features = weight.shape
    _check_tensor(f"lora_a{at}", a, x, "(r, in)")
    _check_tensor(f"lora_b{at}", b, x, "(out, r)")
    if a.dim() != 2 or a.shape[1] != in_features:
        raise ValueError(
            f"lora_a{at} has shape {_shape(a)}; expected (r, in) with in = {in_features}"
        )
    rank = a.shape[0]
    if not 1 <= rank <= MAX_RANK:
        raise ValueError(
            f"lora_a{at} has shape {_shape(a)}, rank {rank}; expected a rank of 1 to {MAX_RANK}"
        )
    if b.dim() != 2 or b.shape[0] != out_features or b.shape[1] != rank:
        raise ValueError(
            f"lora_b{at} has shape {_shape(b)}; expected (out, r) = ({out_features}, {rank}), "
            f"out from weight and r from lora_a{at}"
        )
    _check_dtype(f"lora_a{at}", a, x, autocast, wider=True)
    _check_dtype(f"lora_b{at}", b, x, autocast, wider=True)


def _check_lora_bias(
    lora_bias: Any, n: int, x: Tensor, weight: Tensor, autocast: bool
) -> Sequence[Tensor | None]:
    if lora_bias is None:
        return (None,) * n
    values = _tensors("lora_bias", lora_bias)
    _check_count("lora_bias", values, n)
    for i, value in enumerate(values):
        if value is not None:
            name = f"lora_bias[{i}]" if n > 1 else "lora_bias"
            _check_tensor(name, value, x, "(out,)")
            _check_vector(name, value, weight)
            _check_dtype(name, value, x, autocast, wider=True)
    return values


def _check_tensor(name: str, value: Any, x: Tensor, shape: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name} is a {type(value).__name__}; expected a torch.Tensor of shape {shape}"
        )
    if value.layout is not torch.strided or value.is_nested:
        raise TypeError(f"{name} is {_layout(value)}; expected a dense tensor of shape {shape}")
    if value.device != x.device:
        raise ValueError(f"{name} is on {value.device}; expected {x.device}, where x is")


def _check_vector(name: str, value: Tensor, weight: Tensor) -> None:
    if value.dim() != 1 or value.shape[0] != weight.shape[0]:
        raise ValueError(
            f"{name} has shape {_shape(value)}; expected (out,) = ({weight.shape[0]},)"
        )


def _check_dtype(name: str, value: Tensor, x: Tensor, autocast: bool, *, wider: bool) -> None:
    dtype = value.dtype
    if dtype == x.dtype:
        return
    if autocast:
        if dtype not in _DTYPES:
            raise TypeError(
                f"{name} has dtype {dtype}; expected a floating dtype of {', '.join(map(str, _DTYPES))}"
            )
        return
    if wider and x.dtype in _HALVES:
        if dtype == torch.float32:
            return
        raise TypeError(
            f"{name} has dtype {dtype}; expected {x.dtype}, x's dtype, or torch.float32"
        )
    raise TypeError(f"{name} has dtype {dtype}; expected {x.dtype}, x's dtype")


def _check_count(name: str, values: Sequence[Any], n: int) -> None:
    if len(values) != n:
        raise ValueError(f"{name} has {len(values)} entries; expected {n}, one for each lora_a")


def _tensors(name: str, value: Any) -> Sequence[Tensor]:
    if isinstance(value, Tensor):
        return (value,)
    if isinstance(value, (list, tuple)):
        return value
    raise TypeError(
        f"{name} is a {type(value).__name__}; expected a torch.Tensor or a list or tuple of them"
    )


def _numbers(name: str, value: Any, n: int) -> tuple[float, ...]:
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,) * n
    _check_count(name, values, n)
    for v in values:
        if isinstance(v, bool) or not isinstance(v, _NUMBERS):
            raise TypeError(
                f"{name} holds a {type(v).__name__}; expected a number for each adapter"
            )
    try:
        return tuple([float(v) for v in values])
    except OverflowError:
        raise ValueError(f"{name} is too large for a float; expected a finite number") from None


def _layout(value: Tensor) -> str:
    return "a nested tensor" if value.is_nested else f"of layout {value.layout}"


def _shape(value: Tensor) -> str:
    return str(tuple(value.shape))
