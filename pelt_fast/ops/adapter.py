"""Operators of the bottleneck adapter; see ``pelt_fast/ops/lora.py`` for what an operator does here."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from ..dispatch import AdapterProblem, arch_of, asked_for, select
from .library import define
from .rows import from_rows, to_rows

GRADIENTS = (
    "x",
    "skip",
    "down",
    "down_bias",
    "up",
    "up_bias",
    "scale",
    "gate",
    "pre_weight",
    "pre_bias",
    "ln_weight",
    "ln_bias",
)
"""What backward returns, in this order."""


def problem_of(
    op: str,
    rows: Tensor,
    tokens: int,
    parameters: Sequence[Tensor],
    *,
    activation: str,
    pre_ln: bool,
    post_ln: bool,
    skip: bool,
    gate: bool,
    dropout: bool,
) -> AdapterProblem:
    """Describes a call; ``rows`` is x or dy, ``parameters`` begins with down (m, d)."""
    device = rows.device
    return AdapterProblem(
        op=op,
        device_type=device.type,
        arch=arch_of(device.type, device.index),
        dtype=rows.dtype,
        param_dtypes=tuple([p.dtype for p in parameters]),
        tokens=tokens,
        features=parameters[0].shape[1],
        bottleneck=parameters[0].shape[0],
        activation=activation,
        pre_ln=pre_ln,
        post_ln=post_ln,
        skip=skip,
        gate=gate,
        dropout=dropout,
    )


def _forward(
    x: Tensor,
    skip: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    scale: Tensor | None,
    gate: Tensor | None,
    pre_weight: Tensor | None,
    pre_bias: Tensor | None,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    seed: Tensor | None,
    activation: str,
    scaling: float,
    pre_eps: float,
    eps: float,
    dropout_p: float,
    skip_in: bool,
    residual_x: bool,
    residual_skip: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = to_rows(x)
    tokens = rows.shape[0]
    if tokens == 0:
        return _forward_fake(
            *(x, skip, down, down_bias, up, up_bias, scale, gate, pre_weight, pre_bias),
            *(ln_weight, ln_bias, seed, activation, scaling, pre_eps, eps, dropout_p),
            *(skip_in, residual_x, residual_skip, backend),
        )
    problem = problem_of(
        "bottleneck_adapter_fwd",
        rows,
        tokens,
        (down, up),
        activation=activation,
        pre_ln=pre_weight is not None,
        post_ln=ln_weight is not None,
        skip=skip is not None,
        gate=gate is not None,
        dropout=seed is not None,
    )
    run = select(problem, backend or asked_for()).module
    y, q, pre_stats, post_stats = run.bottleneck_adapter_fwd(
        rows,
        None if skip is None else to_rows(skip),
        down,
        down_bias,
        up,
        up_bias,
        scale,
        gate,
        pre_weight,
        pre_bias,
        ln_weight,
        ln_bias,
        seed,
        activation,
        scaling,
        pre_eps,
        eps,
        dropout_p,
        skip_in,
        residual_x,
        residual_skip,
    )
    return (
        from_rows(y, x.shape),
        q,
        no_stats(x) if pre_stats is None else pre_stats,
        no_stats(x) if post_stats is None else post_stats,
    )


def no_stats(x: Tensor) -> Tensor:
    """In the place of the statistics of a layernorm that is not there."""
    return x.new_empty(0, dtype=torch.promote_types(x.dtype, torch.float32))


def _forward_fake(
    x: Tensor,
    skip: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    scale: Tensor | None,
    gate: Tensor | None,
    pre_weight: Tensor | None,
    pre_bias: Tensor | None,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    seed: Tensor | None,
    activation: str,
    scaling: float,
    pre_eps: float,
    eps: float,
    dropout_p: float,
    skip_in: bool,
    residual_x: bool,
    residual_skip: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens = prod(x.shape[:-1])
    stats = torch.promote_types(x.dtype, torch.float32)
    return (
        x.new_empty(x.shape),
        x.new_empty((tokens, down.shape[0])),
        x.new_empty((tokens, 2), dtype=stats) if pre_weight is not None else no_stats(x),
        x.new_empty((tokens, 2), dtype=stats) if ln_weight is not None else no_stats(x),
    )


def _backward(
    dy: Tensor,
    x: Tensor,
    skip: Tensor | None,
    q: Tensor,
    pre_stats: Tensor | None,
    post_stats: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    scale: Tensor | None,
    gate: Tensor | None,
    pre_weight: Tensor | None,
    pre_bias: Tensor | None,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    seed: Tensor | None,
    activation: str,
    scaling: float,
    pre_eps: float,
    eps: float,
    dropout_p: float,
    skip_in: bool,
    residual_x: bool,
    residual_skip: bool,
    needs: Sequence[bool],
    backend: str,
) -> list[Tensor]:
    if dy.layout is not torch.strided:  # gather(sparse_grad=True) gives such ones
        dy = dy.to_dense()
    rows = to_rows(dy)
    tokens = rows.shape[0]
    arguments = [x, skip, down, down_bias, up, up_bias, scale, gate]
    arguments += [pre_weight, pre_bias, ln_weight, ln_bias]
    if tokens == 0:  # sums of nothing
        return [g.zero_() for g in gradients_like(dy, arguments, needs)]
    problem = problem_of(
        "bottleneck_adapter_bwd",
        rows,
        tokens,
        (down, up),
        activation=activation,
        pre_ln=pre_weight is not None,
        post_ln=ln_weight is not None,
        skip=skip is not None,
        gate=gate is not None,
        dropout=seed is not None,
    )
    run = select(problem, backend or asked_for()).module
    grads = run.bottleneck_adapter_bwd(
        rows,
        to_rows(x),
        None if skip is None else to_rows(skip),
        q,
        pre_stats if pre_weight is not None else None,
        post_stats if ln_weight is not None else None,
        down,
        down_bias,
        up,
        up_bias,
        scale,
        gate,
        pre_weight,
        pre_bias,
        ln_weight,
        ln_bias,
        seed,
        activation,
        scaling,
        pre_eps,
        eps,
        dropout_p,
        skip_in,
        residual_x,
        residual_skip,
        needs,
    )
    dx, dskip, *rest = [dy.new_empty(0) if g is None else g for g in grads]
    return [
        from_rows(dx, dy.shape) if needs[0] else dx,
        from_rows(dskip, dy.shape) if needs[1] else dskip,
        *rest,
    ]


def gradients_like(
    dy: Tensor, arguments: Sequence[Tensor | None], needs: Sequence[bool]
) -> list[Tensor]:
    """Uninitialised gradients: of x and skip in dy's shape, of the others in their own; empty where not needed."""
    shapes = [dy.shape, dy.shape, *[None if a is None else a.shape for a in arguments[2:]]]
    found = []
    for argument, shape, need in zip(arguments, shapes, needs, strict=True):
        if need and argument is not None and shape is not None:
            found.append(argument.new_empty(shape))
        else:
            found.append(dy.new_empty(0))
    return found


def _backward_fake(
    dy: Tensor,
    x: Tensor,
    skip: Tensor | None,
    q: Tensor,
    pre_stats: Tensor | None,
    post_stats: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    scale: Tensor | None,
    gate: Tensor | None,
    pre_weight: Tensor | None,
    pre_bias: Tensor | None,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    seed: Tensor | None,
    activation: str,
    scaling: float,
    pre_eps: float,
    eps: float,
    dropout_p: float,
    skip_in: bool,
    residual_x: bool,
    residual_skip: bool,
    needs: Sequence[bool],
    backend: str,
) -> list[Tensor]:
    arguments = [x, skip, down, down_bias, up, up_bias, scale, gate]
    arguments += [pre_weight, pre_bias, ln_weight, ln_bias]
    return gradients_like(dy, arguments, needs)


_PARAMETERS = (
    "Tensor down, Tensor? down_bias, Tensor up, Tensor? up_bias, Tensor? scale, Tensor? gate, "
    "Tensor? pre_weight, Tensor? pre_bias, Tensor? ln_weight, Tensor? ln_bias, Tensor? seed"
)
_SETTINGS = (
    "str activation, float scaling, float pre_eps, float eps, float dropout_p, "
    "bool skip_in, bool residual_x, bool residual_skip"
)

bottleneck_adapter_fwd = define(
    f"bottleneck_adapter_fwd(Tensor x, Tensor? skip, {_PARAMETERS}, {_SETTINGS}, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
bottleneck_adapter_bwd = define(
    "bottleneck_adapter_bwd(Tensor dy, Tensor x, Tensor? skip, Tensor q, Tensor? pre_stats, Tensor? post_stats, "
    f"{_PARAMETERS}, {_SETTINGS}, bool[] needs, str backend) -> Tensor[]",
    _backward,
    _backward_fake,
)
