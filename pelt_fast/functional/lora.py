"""The LoRA linear as a function of tensors. Arguments are checked here, once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..autograd import LoRALinearFunction
from ..dispatch import ORDINARY, Explanation, explain_problem
from ..ops.lora import problem_of
from ..random import new_seed
from .checks import (
    autocast_dtype,
    backend_name,
    check_dtype,
    check_finite,
    check_input,
    check_input_dtype,
    check_probability,
    check_tensor,
    check_vector,
    number,
    shape_of,
    tensors,
)
from .ordinary import short_way

MAX_RANK = 256


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
    extension = short_way(backend)
    if extension is not None:
        found = extension.ordinary_lora_linear(
            x, weight, bias, lora_a, lora_b, scaling, lora_bias, dropout_p, training
        )
        if type(found) is Tensor:
            return found
        if found is not None:
            all_a, all_b, all_bias, scales, rates = found
            drawn = new_seed(x.device) if any(rates) else None
            return LoRALinearFunction.apply(
                x, weight, bias, drawn, scales, rates, ORDINARY, *all_a, *all_b, *all_bias
            )
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


def explain_lora_linear(
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
) -> Explanation:
    """Which backend a call of ``lora_linear`` would run on; same arguments."""
    call = _check(x, weight, bias, lora_a, lora_b, scaling, lora_bias, dropout_p, training, backend)
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
    x, autocast = compute_input(x)
    check_base(x, weight, bias, autocast)
    lora_a = tensors("lora_a", lora_a)
    n = len(lora_a)
    if n == 0:
        raise ValueError("lora_a is empty; expected at least one adapter")
    lora_b = tensors("lora_b", lora_b)
    _check_count("lora_b", lora_b, n)
    for i in range(n):
        check_adapter(i if n > 1 else None, x, weight, lora_a[i], lora_b[i], autocast)
    numbers = _numbers("scaling", scaling, n)
    for value in numbers:
        check_finite("scaling", value)
    rates = _numbers("dropout_p", dropout_p, n)
    for value in rates:
        check_probability("dropout_p", value)
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
        base_backend(weight, backend),
    )


def base_backend(weight: Tensor, backend: str | None) -> str:
    """The backend that is asked for; "torch" where W trains and none is."""
    name = backend_name(backend)
    trains = weight.requires_grad and (torch.compiler.is_compiling() or torch.is_grad_enabled())
    if trains and name in ("", "auto"):
        return "torch"  # a packed copy of a weight that trains would be stale at every step
    return name


def compute_input(x: Tensor) -> tuple[Tensor, bool]:
    """x in the dtype that is computed in, and whether autocast chose it."""
    check_input(x, "in")
    dtype = autocast_dtype(x)
    if dtype is not None:
        return x.to(dtype), True
    check_input_dtype(x)
    return x, False


def check_base(x: Tensor, weight: Tensor, bias: Tensor | None, autocast: bool) -> None:
    """W (out, in) and its bias go with x."""
    check_tensor("weight", weight, x, "(out, in)")
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"weight has shape {shape_of(weight)}; expected (out, in) with in = {x.shape[-1]}, x's last size"
        )
    if weight.shape[0] == 0 or weight.shape[1] == 0:
        raise ValueError(
            f"weight has shape {shape_of(weight)}; expected at least one row and one column"
        )
    check_dtype("weight", weight, x, autocast, wider=False)
    if bias is not None:
        check_tensor("bias", bias, x, "(out,)")
        check_vector("bias", bias, "out", weight.shape[0])
        check_dtype("bias", bias, x, autocast, wider=False)


def check_adapter(
    i: int | None, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, autocast: bool
) -> None:
    """A (r, in) and B (out, r) go with x and W; ``i`` is which adapter's, of several."""
    at = "" if i is None else f"[{i}]"
    out_features, in_features = weight.shape
    check_tensor(f"lora_a{at}", a, x, "(r, in)")
    check_tensor(f"lora_b{at}", b, x, "(out, r)")
    if a.dim() != 2 or a.shape[1] != in_features:
        raise ValueError(
            f"lora_a{at} has shape {shape_of(a)}; expected (r, in) with in = {in_features}"
        )
    rank = a.shape[0]
    if not 1 <= rank <= MAX_RANK:
        raise ValueError(
            f"lora_a{at} has shape {shape_of(a)}, rank {rank}; expected a rank of 1 to {MAX_RANK}"
        )
    if b.dim() != 2 or b.shape[0] != out_features or b.shape[1] != rank:
        raise ValueError(
            f"lora_b{at} has shape {shape_of(b)}; expected (out, r) = ({out_features}, {rank}), "
            f"out from weight and r from lora_a{at}"
        )
    check_dtype(f"lora_a{at}", a, x, autocast, wider=True)
    check_dtype(f"lora_b{at}", b, x, autocast, wider=True)


def _check_lora_bias(
    lora_bias: Any, n: int, x: Tensor, weight: Tensor, autocast: bool
) -> Sequence[Tensor | None]:
    if lora_bias is None:
        return (None,) * n
    values = tensors("lora_bias", lora_bias)
    _check_count("lora_bias", values, n)
    for i, value in enumerate(values):
        if value is not None:
            name = f"lora_bias[{i}]" if n > 1 else "lora_bias"
            check_tensor(name, value, x, "(out,)")
            check_vector(name, value, "out", weight.shape[0])
            check_dtype(name, value, x, autocast, wider=True)
    return values


def _check_count(name: str, values: Sequence[Any], n: int) -> None:
    if len(values) != n:
        raise ValueError(f"{name} has {len(values)} entries; expected {n}, one for each lora_a")


def _numbers(name: str, value: Any, n: int) -> tuple[float, ...]:
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,) * n
    _check_count(name, values, n)
    return tuple([number(name, v, "a number for each adapter") for v in values])
