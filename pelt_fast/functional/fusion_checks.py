"""Checks of what AdapterFusion takes: N adapters, the attention's matrices, and what goes around them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..activations import activation_name
from ..autograd.fusion import FusionSettings
from .adapter_checks import check_eps, check_layernorm, check_like, check_rows, terms
from .checks import (
    backend_name,
    check_dtype,
    check_finite,
    check_probability,
    check_tensor,
    check_vector,
    number,
    shape_of,
)
from .fusion_cache import folds as fold_cache
from .fusion_fold import Adapters, Attention, Folded, trains

Biases = Sequence[Tensor | None] | None


class Call(NamedTuple):
    """The arguments of ``adapter_fusion``, checked."""

    x: Tensor
    skip: Tensor | None  # as the operator takes it: see ``terms`` of the adapter
    query: Tensor | None
    value_residual: Tensor | None
    residuals: Sequence[Tensor]
    into: Tensor | None  # what is added to x on the way in
    adapters: Adapters
    attention: Attention
    layernorms: tuple[Tensor | None, ...]  # pre_*, ln_*
    settings: FusionSettings

    shift: bool  # whether what all scores have in common matters: to dropout, and to who trains it
    tag: Any  # what a kept fold depends on besides its tensors
    kept: Folded | None  # found


def tag_of(x: Tensor, shift: bool, autocast: bool) -> Any:
    """What a kept fold depends on besides its tensors: what their checks ask about, and whether it has the shift."""
    return (shift, x.shape[-1], x.dtype, x.device, autocast)


def check_call(
    x: Tensor,
    down_weights: Sequence[Tensor],
    down_biases: Biases,
    up_weights: Sequence[Tensor],
    up_biases: Biases,
    *,
    query_weight: Tensor | None = None,
    query_bias: Tensor | None = None,
    key_weight: Tensor | None = None,
    key_bias: Tensor | None = None,
    value_weight: Tensor | None = None,
    query: Tensor | None = None,
    activation: str = "relu",
    scaling: Any = 1.0,
    temperature: float = 1.0,
    value_residual: Tensor | None = None,
    residual: Tensor | Sequence[Tensor] | None = None,
    skip: Tensor | None = None,
    pre_ln_weight: Tensor | None = None,
    pre_ln_bias: Tensor | None = None,
    pre_ln_eps: float = 1e-5,
    ln_weight: Tensor | None = None,
    ln_bias: Tensor | None = None,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    training: bool = False,
    return_attention: bool = False,
    backend: str | None = None,
    kept: Folded | None = None,
) -> Call:
    """The arguments of ``adapter_fusion``; ``kept``: found already, for these tensors and no dropout."""
    attention = Attention(query_weight, query_bias, key_weight, key_bias, value_weight)
    given, others = x, (("query", query), ("value_residual", value_residual))
    x, skip, residuals, autocast = check_rows(x, residual, skip)
    d = x.shape[-1]
    for name, other in others:
        if other is not None:
            check_like(name, other, x)
            check_dtype(name, other, x, autocast, wider=False)
    # what goes into products or into what comes out of them promotes nothing
    query, value_residual = (
        t if t is None else x if t is given else t.to(x.dtype) for t in (query, value_residual)
    )

    rate = number("dropout_p", dropout_p)
    check_probability("dropout_p", rate)
    rate = rate if training else 0.0
    shift = rate > 0 or (
        torch.is_grad_enabled() and isinstance(key_bias, Tensor) and key_bias.requires_grad
    )
    tag = tag_of(x, shift, autocast)
    adapters = as_given(down_weights, down_biases, up_weights, up_biases, scaling)
    keeps = kept is None and value_residual is None and not torch.compiler.is_compiling()
    if keeps and adapters is not None and not trains(adapters, attention):
        kept = fold_cache.find(adapters, attention, tag)
    if kept is None or adapters is None:
        adapters = _check_adapters(
            x, down_weights, down_biases, up_weights, up_biases, scaling, autocast
        )
        _check_attention(x, attention, autocast)
    vectors = (
        ("pre_ln_weight", pre_ln_weight),
        ("pre_ln_bias", pre_ln_bias),
        ("ln_weight", ln_weight),
        ("ln_bias", ln_bias),
    )
    for name, vector in vectors:
        if vector is not None:
            _check_vector(name, vector, x, "d", d, autocast)
    check_layernorm("pre_ln", pre_ln_weight, pre_ln_bias)
    check_layernorm("ln", ln_weight, ln_bias)
    warmth = number("temperature", temperature)
    if not 0.0 < warmth < float("inf"):
        raise ValueError(f"temperature is {warmth}; expected a positive finite number")
    if not isinstance(activation, str):
        raise TypeError(
            f"activation is a {type(activation).__name__}; expected the name of an activation"
        )
    term, skip_in, residual_x, residual_skip, whole = terms(x, skip, residuals)
    into = skip if whole is x else None  # else it is in it
    settings = FusionSettings(
        activation_name(activation),
        adapters.widths,
        warmth,
        check_eps("pre_ln_eps", pre_ln_eps),
        check_eps("eps", eps),
        rate,
        skip_in,
        residual_x,
        residual_skip,
        backend_name(backend),
    )
    return Call(
        *(whole, term, query, value_residual, residuals, into, adapters, attention),
        (pre_ln_weight, pre_ln_bias, ln_weight, ln_bias),
        *(settings, shift, tag, kept),
    )


def as_given(
    down_weights: Any, down_biases: Any, up_weights: Any, up_biases: Any, scaling: Any
) -> Adapters | None:
    """The arguments as they came, if they are sequences of one length; else checks have something to say."""
    if not isinstance(down_weights, (list, tuple)) or not down_weights:
        return None
    none = [None] * len(down_weights)
    downs = none if down_biases is None else down_biases
    ups = none if up_biases is None else up_biases
    factors = scaling if isinstance(scaling, (list, tuple)) else [scaling] * len(none)
    factors = [float(s) if type(s) in (int, float) else s for s in factors]
    found = Adapters(down_weights, downs, up_weights, ups, factors)
    alike = all(isinstance(t, (list, tuple)) and len(t) == len(none) for t in found)
    return found if alike else None


def _check_adapters(
    x: Tensor,
    down_weights: Any,
    down_biases: Any,
    up_weights: Any,
    up_biases: Any,
    scaling: Any,
    autocast: bool,
) -> Adapters:
    d = x.shape[-1]
    downs = _sequence("down_weights", down_weights, "(m_n, d)")
    if not downs:
        raise ValueError("down_weights is empty; expected at least one adapter")
    n = len(downs)
    ups = _sequence("up_weights", up_weights, "(d, m_n)", n)
    down_biases = (
        [None] * n if down_biases is None else _sequence("down_biases", down_biases, "(m_n,)", n)
    )
    up_biases = [None] * n if up_biases is None else _sequence("up_biases", up_biases, "(d,)", n)
    scalings = list(scaling) if isinstance(scaling, (list, tuple)) else [scaling] * n
    if len(scalings) != n:
        raise ValueError(
            f"scaling has {len(scalings)} entries; expected {n}, as many as down_weights"
        )
    for i, (down, down_bias, up, up_bias) in enumerate(
        zip(downs, down_biases, ups, up_biases, strict=True)
    ):
        name = f"down_weights[{i}]"
        check_tensor(name, down, x, "(m_n, d)")
        if down.dim() != 2 or down.shape[1] != d or 0 in down.shape:
            raise ValueError(
                f"{name} has shape {shape_of(down)}; expected (m_n, d) with d = {d}, x's last size, and m_n >= 1"
            )
        m = down.shape[0]
        check_tensor(f"up_weights[{i}]", up, x, "(d, m_n)")
        if tuple(up.shape) != (d, m):
            raise ValueError(
                f"up_weights[{i}] has shape {shape_of(up)}; expected (d, m_n) = ({d}, {m}), m_n from {name}"
            )
        check_dtype(name, down, x, autocast, wider=True)
        check_dtype(f"up_weights[{i}]", up, x, autocast, wider=True)
        if down_bias is not None:
            _check_vector(f"down_biases[{i}]", down_bias, x, "m_n", m, autocast)
        if up_bias is not None:
            _check_vector(f"up_biases[{i}]", up_bias, x, "d", d, autocast)
        scalings[i] = _check_scaling(
            f"scaling[{i}]" if isinstance(scaling, (list, tuple)) else "scaling",
            *(scalings[i], x, d, autocast),
        )
    return Adapters(downs, down_biases, ups, up_biases, scalings)


def _check_scaling(name: str, scaling: Any, x: Tensor, d: int, autocast: bool) -> float | Tensor:
    if not isinstance(scaling, Tensor):
        factor = number(name, scaling, "a number or a torch.Tensor of one element or of d")
        check_finite(name, factor)
        return factor
    check_tensor(name, scaling, x, "(1,) or (d,)")
    check_dtype(name, scaling, x, autocast, wider=True)
    if scaling.dim() > 1 or scaling.numel() not in (1, d):
        raise ValueError(
            f"{name} has shape {shape_of(scaling)}; expected (), (1,) or (d,) = ({d},)"
        )
    return scaling


def _check_attention(x: Tensor, attention: Attention, autocast: bool) -> None:
    d = x.shape[-1]
    query_weight, query_bias, key_weight, key_bias, value_weight = attention
    for name, weight, bias in (
        ("query", query_weight, query_bias),
        ("key", key_weight, key_bias),
        ("value", value_weight, None),
    ):
        if weight is not None:
            check_tensor(f"{name}_weight", weight, x, "(d, d)")
            if tuple(weight.shape) != (d, d):
                raise ValueError(
                    f"{name}_weight has shape {shape_of(weight)}; expected (d, d) = ({d}, {d})"
                )
            check_dtype(f"{name}_weight", weight, x, autocast, wider=True)
        if bias is not None:
            if weight is None:
                raise ValueError(
                    f"{name}_bias is given without {name}_weight; expected both, the weight alone, or neither"
                )
            _check_vector(f"{name}_bias", bias, x, "d", d, autocast)


def _check_vector(
    name: str, vector: Any, x: Tensor, symbol: str, size: int, autocast: bool
) -> None:
    check_tensor(name, vector, x, f"({symbol},)")
    check_vector(name, vector, symbol, size)
    check_dtype(name, vector, x, autocast, wider=True)


def _sequence(name: str, value: Any, shape: str, count: int | None = None) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise TypeError(
            f"{name} is a {type(value).__name__}; expected a list or tuple of torch.Tensor {shape}"
        )
    if count is not None and len(value) != count:
        raise ValueError(
            f"{name} has {len(value)} entries; expected {count}, as many as down_weights"
        )
    return list(value)
