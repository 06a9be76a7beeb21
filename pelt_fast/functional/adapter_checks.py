"""Checks of what goes around the projections of an adapter: rows that are added, vectors, factors, settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..activations import activation_name
from ..autograd.adapter import Settings
from ..dispatch import BackendUnavailable
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

Activation = str | Callable[[Tensor], Tensor]
_COMPOSED = "callable"  # the activation of a problem whose activation no kernel can have


class Rows(NamedTuple):
    """The tensors of size T × d, in the dtype that is computed in."""

    x: Tensor
    skip: Tensor | None
    residuals: Sequence[Tensor]
    autocast: bool  # it chose the dtype


class Around(NamedTuple):
    """What is not the projections', as the operators take it."""

    x: Tensor
    skip: Tensor | None
    scale: Tensor | None
    gate: Tensor | None
    settings: Settings
    function: Callable[[Tensor], Tensor] | None  # an activation that no kernel has


def check_rows(x: Tensor, residual: Tensor | Sequence[Tensor] | None, skip: Tensor | None) -> Rows:
    """x, what is added to it and what is added in the end."""
    check_input(x, "d")
    residuals = () if residual is None else tensors("residual", residual)
    for i, value in enumerate(residuals):
        check_like("residual" if len(residuals) == 1 else f"residual[{i}]", value, x)
    if skip is not None:
        check_like("skip", skip, x)
    return Rows(*_in_one_dtype(x, skip, residuals))


def check_vectors(
    rows: Rows,
    m: int,
    down_bias: Tensor | None,
    up_bias: Tensor | None,
    pre_ln_weight: Tensor | None,
    pre_ln_bias: Tensor | None,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
) -> None:
    """Biases and layernorms."""
    x, d = rows.x, rows.x.shape[-1]
    vectors = (
        ("down_bias", down_bias, "m", m),
        ("up_bias", up_bias, "d", d),
        ("pre_ln_weight", pre_ln_weight, "d", d),
        ("pre_ln_bias", pre_ln_bias, "d", d),
        ("ln_weight", ln_weight, "d", d),
        ("ln_bias", ln_bias, "d", d),
    )
    for name, vector, symbol, size in vectors:
        if vector is not None:
            check_tensor(name, vector, x, f"({symbol},)")
            check_vector(name, vector, symbol, size)
            check_dtype(name, vector, x, rows.autocast, wider=True)
    check_layernorm("pre_ln", pre_ln_weight, pre_ln_bias)
    check_layernorm("ln", ln_weight, ln_bias)


def check_around(
    rows: Rows,
    activation: Activation,
    scaling: float | Tensor,
    gate: Tensor | None,
    pre_ln_eps: float,
    eps: float,
    dropout_p: float,
    training: bool,
    backend: str | None,
    operation: str,
) -> Around:
    """The rest: what is neither a matrix nor a vector over the features."""
    x, skip, residuals, autocast = rows
    factor, scale = _scaling(scaling, x, x.shape[-1], autocast)
    rate = number("dropout_p", dropout_p)
    check_probability("dropout_p", rate)
    name, function = check_activation(activation)
    chosen = backend_name(backend)
    if function is not None:
        check_composed(operation, chosen)
    skip, skip_in, residual_x, residual_skip, x = terms(x, skip, residuals)
    settings = Settings(
        name,
        factor,
        check_eps("pre_ln_eps", pre_ln_eps),
        check_eps("eps", eps),
        rate if training else 0.0,
        skip_in,
        residual_x,
        residual_skip,
        chosen,
    )
    gates = None if gate is None else check_gate(gate, x, autocast)
    return Around(x, skip, scale, gates, settings, function)


def once_each(tensors: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Repeats as views: Dynamo takes no Function that gets a tensor twice, as Pfeiffer's gets its layernorm."""
    return tuple(
        t.view_as(t) if t is not None and any(t is u for u in tensors[:i]) else t
        for i, t in enumerate(tensors)
    )


def check_like(name: str, value: Any, x: Tensor) -> None:
    """``value`` is a tensor of x's shape, where x is."""
    check_tensor(name, value, x, "x's")
    if value.shape != x.shape:
        raise ValueError(f"{name} has shape {shape_of(value)}; expected {shape_of(x)}, x's shape")


def _in_one_dtype(
    x: Tensor, skip: Tensor | None, residuals: Sequence[Tensor]
) -> tuple[Tensor, Tensor | None, Sequence[Tensor], bool]:
    """The tensors of size T × d in the dtype that is computed in, and whether autocast chose it.

    Under autocast what is added keeps its precision, as it does in PyTorch: there a bf16 product plus an fp32 residual
    is fp32.
    """
    dtype = autocast_dtype(x)
    autocast = dtype is not None
    if not autocast:
        check_input_dtype(x)
    for i, value in enumerate(residuals):
        name = "residual" if len(residuals) == 1 else f"residual[{i}]"
        check_dtype(name, value, x, autocast, wider=False)
    if skip is not None:
        check_dtype("skip", skip, x, autocast, wider=False)
    if dtype is None:
        return x, skip, residuals, False
    added = [*residuals] if skip is None else [*residuals, skip, x]
    for value in added:
        dtype = torch.promote_types(dtype, value.dtype)
    cast = {id(value): value.to(dtype) for value in (x, *added)}  # identities are kept
    return (
        cast[id(x)],
        None if skip is None else cast[id(skip)],
        [cast[id(r)] for r in residuals],
        True,
    )


def check_layernorm(name: str, weight: Tensor | None, bias: Tensor | None) -> None:
    """No bias without a weight."""
    if weight is None and bias is not None:
        raise ValueError(
            f"{name}_bias is given without {name}_weight; expected both, the weight alone, or neither"
        )


def _scaling(
    scaling: float | Tensor, x: Tensor, d: int, autocast: bool
) -> tuple[float, Tensor | None]:
    """The factor, and the tensor (1,) or (d,) of one that is learned."""
    if not isinstance(scaling, Tensor):
        factor = number("scaling", scaling, "a number or a torch.Tensor of one element or of d")
        check_finite("scaling", factor)
        return factor, None
    check_tensor("scaling", scaling, x, "(1,) or (d,)")
    check_dtype("scaling", scaling, x, autocast, wider=True)
    if scaling.dim() > 1 or scaling.numel() not in (1, d):
        raise ValueError(
            f"scaling has shape {shape_of(scaling)}; expected (), (1,) or (d,) = ({d},)"
        )
    return 1.0, scaling.reshape(-1)


def check_eps(name: str, value: float) -> float:
    """``value`` as a float, finite and not negative."""
    eps = number(name, value)
    if not 0.0 <= eps < float("inf"):
        raise ValueError(f"{name} is {eps}; expected a finite number that is not negative")
    return eps


def check_activation(activation: Activation) -> tuple[str, Callable[[Tensor], Tensor] | None]:
    """The name of the activation; a function too where it is one that no kernel has."""
    if isinstance(activation, str):
        return activation_name(activation), None
    if callable(activation):
        return _COMPOSED, activation
    raise TypeError(
        f"activation is a {type(activation).__name__}; expected the name of an activation or a callable"
    )


def check_composed(operation: str, backend: str) -> None:
    """A backend that can run a call whose activation is a callable."""
    if backend not in ("", "auto", "torch"):
        raise BackendUnavailable(
            f"backend {backend!r} cannot run {operation} with a callable as activation; expected the name of "
            "an activation, or backend 'torch', which composes the call of PyTorch's own operators"
        )


def check_gate(gate: Tensor, x: Tensor, autocast: bool) -> Tensor:
    """(..., 1), broadcastable, to (T,)."""
    check_tensor("gate", gate, x, "(..., 1)")
    check_dtype("gate", gate, x, autocast, wider=True)
    shape = (*x.shape[:-1], 1)
    fits = gate.dim() <= len(shape) and all(
        size in (1, wanted)
        for size, wanted in zip(reversed(gate.shape), reversed(shape), strict=False)
    )
    if not fits:
        raise ValueError(
            f"gate has shape {shape_of(gate)}; expected one that broadcasts to {tuple(shape)}: a factor for each "
            "token, or for each sample"
        )
    return gate.expand(shape).reshape(-1)


def terms(
    x: Tensor, skip: Tensor | None, residuals: Sequence[Tensor]
) -> tuple[Tensor | None, bool, bool, bool, Tensor]:
    """skip, skip_in, residual_x, residual_skip, x of the operator: two tensors and where each is added.

    What does not fit (a tensor twice among the residuals, a third tensor) is summed first.
    """
    residual_x = any(r is x for r in residuals)
    others = [r for r in residuals if r is not x]
    if sum(1 for r in residuals if r is x) > 1:
        residual_x, others = False, list(residuals)
    if skip is not None:
        if all(r is skip for r in others) and len(others) <= 1:
            return skip, True, residual_x, len(others) == 1, x
        others = list(residuals)
        x, residual_x = x + skip, False
    if not others:
        return None, False, residual_x, False, x
    total = others[0]
    for other in others[1:]:
        total = total + other
    return total, False, residual_x, True, x
