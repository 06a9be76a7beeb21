"""Operators of batched bottleneck adapters; see ``pelt_fast/ops/lora.py`` for what an operator does here.

``plan`` is ``MultiAdapterPlan.arrays``, ``widths`` (L,) int32, ``scale`` (L,), ``gate`` (T,).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from ..dispatch import MultiBottleneckProblem, arch_of, asked_for, select
from .adapter import gradients_like, no_stats
from .library import define
from .rows import from_rows, to_rows

GRADIENTS = (
    "x",
    "residual",
    "down",
    "down_bias",
    "up",
    "up_bias",
    "scale",
    "gate",
    "ln_weight",
    "ln_bias",
)
"""What backward returns, in this order."""


def problem_of(
    op: str,
    rows: Tensor,
    tokens: int,
    down: Tensor,
    up: Tensor,
    *,
    activation: str,
    post_ln: bool,
    residual: bool,
    gate: bool,
    dropout: bool,
) -> MultiBottleneckProblem:
    """Describes a call; ``rows`` is x or dy."""
    device = rows.device
    return MultiBottleneckProblem(
        op=op,
        device_type=device.type,
        arch=arch_of(device.type, device.index),
        dtype=rows.dtype,
        adapter_dtypes=(down.dtype, up.dtype),
        tokens=tokens,
        adapters=down.shape[0],
        features=down.shape[2],
        bottleneck=down.shape[1],
        activation=activation,
        post_ln=post_ln,
        residual=residual,
        gate=gate,
        dropout=dropout,
    )


def _forward(
    x: Tensor,
    residual: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    scale: Tensor | None,
    gate: Tensor | None,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    plan: Sequence[Tensor],
    widths: Tensor,
    seed: Tensor | None,
    activation: str,
    scaling: float,
    eps: float,
    dropout_p: float,
    residual_x: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = to_rows(x)
    tokens = rows.shape[0]
    if tokens == 0:
        return _empty_forward(x, down, ln_weight)
    problem = problem_of(
        *("multi_bottleneck_fwd", rows, tokens, down, up),
        activation=activation,
        post_ln=ln_weight is not None,
        residual=residual is not None,
        gate=gate is not None,
        dropout=seed is not None,
    )
    run = select(problem, backend or asked_for()).module
    y, q, stats = run.multi_bottleneck_fwd(
        *(rows, None if residual is None else to_rows(residual), down, down_bias, up, up_bias),
        *(scale, gate, ln_weight, ln_bias, plan, widths, seed),
        *(activation, scaling, eps, dropout_p, residual_x),
    )
    return from_rows(y, x.shape), q, no_stats(x) if stats is None else stats


def _empty_forward(
    x: Tensor, down: Tensor, ln_weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, wide = prod(x.shape[:-1]), torch.promote_types(x.dtype, torch.float32)
    stats = no_stats(x) if ln_weight is None else x.new_empty((tokens, 2), dtype=wide)
    return x.new_empty(x.shape), x.new_empty((tokens, down.shape[1])), stats


def _forward_fake(
    x: Tensor,
    residual: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    scale: Tensor | None,
    gate: Tensor | None,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    plan: Sequence[Tensor],
    widths: Tensor,
    seed: Tensor | None,
    activation: str,
    scaling: float,
    eps: float,
    dropout_p: float,
    residual_x: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_forward(x, down, ln_weight)


def _backward(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    q: Tensor,
    stats: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    scale: Tensor | None,
    gate: Tensor | None,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    plan: Sequence[Tensor],
    widths: Tensor,
    seed: Tensor | None,
    activation: str,
    scaling: float,
    eps: float,
    dropout_p: float,
    residual_x: bool,
    needs: Sequence[bool],
    backend: str,
) -> list[Tensor]:
    if dy.layout is not torch.strided:  # gather(sparse_grad=True) gives such ones
        dy = dy.to_dense()
    rows = to_rows(dy)
    tokens = rows.shape[0]
    owners = [x, residual, down, down_bias, up, up_bias, scale, gate, ln_weight, ln_bias]
    if tokens == 0:  # sums of nothing
        return [g.zero_() for g in _gradients_like(dy, owners, needs)]
    problem = problem_of(
        *("multi_bottleneck_bwd", rows, tokens, down, up),
        activation=activation,
        post_ln=ln_weight is not None,
        residual=residual is not None,
        gate=gate is not None,
        dropout=seed is not None,
    )
    run = select(problem, backend or asked_for()).module
    found = run.multi_bottleneck_bwd(
        *(rows, to_rows(x), None if residual is None else to_rows(residual), q),
        *(stats if ln_weight is not None else None, down, down_bias, up, up_bias),
        *(scale, gate, ln_weight, ln_bias, plan, widths, seed),
        *(activation, scaling, eps, dropout_p, residual_x, needs),
    )
    dx, dresidual, *rest = [dy.new_empty(0) if g is None else g for g in found]
    for i, parameter in ((0, down), (2, up)):
        if needs[2 + i] and rest[i].stride() != _strides_like(parameter):
            rest[i] = torch.empty_like(parameter).copy_(rest[i])
    return [
        from_rows(dx, dy.shape) if needs[0] else dx,
        from_rows(dresidual, dy.shape) if needs[1] else dresidual,
        *rest,
    ]


def _strides_like(parameter: Tensor) -> tuple[int, ...]:
    """In the order of the parameter's memory; of one that is dense in no order: in some order."""
    return torch.empty_like(parameter, device="meta").stride()


def _gradients_like(
    dy: Tensor, owners: Sequence[Tensor | None], needs: Sequence[bool]
) -> list[Tensor]:
    """Uninitialised gradients; of the matrices in the order of their memory; empty where not needed."""
    found = gradients_like(dy, owners, needs)
    for i in (2, 4):
        parameter = owners[i]
        if needs[i] and parameter is not None:
            found[i] = torch.empty_like(parameter)
    return found


def _backward_fake(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    q: Tensor,
    stats: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    scale: Tensor | None,
    gate: Tensor | None,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    plan: Sequence[Tensor],
    widths: Tensor,
    seed: Tensor | None,
    activation: str,
    scaling: float,
    eps: float,
    dropout_p: float,
    residual_x: bool,
    needs: Sequence[bool],
    backend: str,
) -> list[Tensor]:
    owners = [x, residual, down, down_bias, up, up_bias, scale, gate, ln_weight, ln_bias]
    return _gradients_like(dy, owners, needs)


_PARAMETERS = (
    "Tensor down, Tensor? down_bias, Tensor up, Tensor? up_bias, Tensor? scale, Tensor? gate, "
    "Tensor? ln_weight, Tensor? ln_bias, Tensor[] plan, Tensor widths, Tensor? seed"
)
_SETTINGS = "str activation, float scaling, float eps, float dropout_p, bool residual_x"

multi_bottleneck_fwd = define(
    f"multi_bottleneck_fwd(Tensor x, Tensor? residual, {_PARAMETERS}, {_SETTINGS}, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
multi_bottleneck_bwd = define(
    "multi_bottleneck_bwd(Tensor dy, Tensor x, Tensor? residual, Tensor q, Tensor? stats, "
    f"{_PARAMETERS}, {_SETTINGS}, bool[] needs, str backend) -> Tensor[]",
    _backward,
    _backward_fake,
)
