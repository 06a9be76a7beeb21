"""Operators of the Compacter adapter; see ``pelt_fast/ops/lora.py`` for what an operator does here.

The arguments are those of the bottleneck adapter's, with three tensors in the place of each projection's matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..dispatch import CompacterProblem, arch_of, asked_for, select
from .adapter import gradients_like, no_stats
from .library import define
from .rows import from_rows, to_rows

GRADIENTS = (
    "x",
    "skip",
    "down_rule",
    "down_left",
    "down_right",
    "down_bias",
    "up_rule",
    "up_left",
    "up_right",
    "up_bias",
    "scale",
    "gate",
    "pre_weight",
    "pre_bias",
    "ln_weight",
    "ln_bias",
)
"""What backward returns, in this order."""

_TENSORS = len(GRADIENTS) - 2  # between skip and the seed


def problem_of(
    op: str,
    rows: Tensor,
    tokens: int,
    factors: Sequence[Tensor],
    *,
    activation: str,
    pre_ln: bool,
    post_ln: bool,
    skip: bool,
    gate: bool,
    dropout: bool,
) -> CompacterProblem:
    """Describes a call; ``rows`` is x or dy, ``factors`` rule, left and right of down and of up."""
    rule, left, right, _, up_left, _ = factors
    device, n = rows.device, rule.shape[0]
    return CompacterProblem(
        op=op,
        device_type=device.type,
        arch=arch_of(device.type, device.index),
        dtype=rows.dtype,
        param_dtypes=tuple([p.dtype for p in factors]),
        tokens=tokens,
        features=n * left.shape[1],
        bottleneck=n * right.shape[2],
        phm_dim=n,
        ranks=(left.shape[2], up_left.shape[2]),
        activation=activation,
        pre_ln=pre_ln,
        post_ln=post_ln,
        skip=skip,
        gate=gate,
        dropout=dropout,
    )


def _run(op: str, rows: Tensor, skip: Tensor | None, rest: Sequence[Any], backend: str) -> Any:
    """The backend's module; ``rest`` begins with the parameters."""
    problem = problem_of(
        op,
        rows,
        rows.shape[0],
        (*rest[:3], *rest[4:7]),
        activation=rest[_TENSORS + 1],
        pre_ln=rest[10] is not None,
        post_ln=rest[12] is not None,
        skip=skip is not None,
        gate=rest[9] is not None,
        dropout=rest[_TENSORS] is not None,
    )
    return select(problem, backend or asked_for()).module


def _forward(x: Tensor, skip: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = to_rows(x)
    if rows.shape[0] == 0:
        return _forward_fake(x, skip, *rest)
    *arguments, backend = rest
    run = _run("compacter_fwd", rows, skip, arguments, backend)
    y, q, pre_stats, post_stats = run.compacter_fwd(
        rows, None if skip is None else to_rows(skip), *arguments
    )
    return (
        from_rows(y, x.shape),
        q,
        no_stats(x) if pre_stats is None else pre_stats,
        no_stats(x) if post_stats is None else post_stats,
    )


def _forward_fake(
    x: Tensor, skip: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens = prod(x.shape[:-1])
    rule, _, right, *_ = rest
    stats = torch.promote_types(x.dtype, torch.float32)
    return (
        x.new_empty(x.shape),
        x.new_empty((tokens, rule.shape[0] * right.shape[2])),
        x.new_empty((tokens, 2), dtype=stats) if rest[10] is not None else no_stats(x),
        x.new_empty((tokens, 2), dtype=stats) if rest[12] is not None else no_stats(x),
    )


def _backward(
    dy: Tensor,
    x: Tensor,
    skip: Tensor | None,
    q: Tensor,
    pre_stats: Tensor | None,
    post_stats: Tensor | None,
    *rest: Any,
) -> list[Tensor]:
    if dy.layout is not torch.strided:  # gather(sparse_grad=True) gives such ones
        dy = dy.to_dense()
    rows = to_rows(dy)
    *arguments, needs, backend = rest
    if rows.shape[0] == 0:  # sums of nothing
        return [g.zero_() for g in gradients_like(dy, [x, skip, *arguments[:_TENSORS]], needs)]
    run = _run("compacter_bwd", rows, skip, arguments, backend)
    grads = run.compacter_bwd(
        rows,
        to_rows(x),
        None if skip is None else to_rows(skip),
        q,
        pre_stats if arguments[10] is not None else None,
        post_stats if arguments[12] is not None else None,
        *arguments,
        needs,
    )
    dx, dskip, *others = [dy.new_empty(0) if g is None else g for g in grads]
    return [
        from_rows(dx, dy.shape) if needs[0] else dx,
        from_rows(dskip, dy.shape) if needs[1] else dskip,
        *others,
    ]


def _backward_fake(
    dy: Tensor,
    x: Tensor,
    skip: Tensor | None,
    q: Tensor,
    pre_stats: Tensor | None,
    post_stats: Tensor | None,
    *rest: Any,
) -> list[Tensor]:
    *arguments, needs, _ = rest
    return gradients_like(dy, [x, skip, *arguments[:_TENSORS]], needs)


_PARAMETERS = (
    "Tensor down_rule, Tensor down_left, Tensor down_right, Tensor? down_bias, "
    "Tensor up_rule, Tensor up_left, Tensor up_right, Tensor? up_bias, Tensor? scale, Tensor? gate, "
    "Tensor? pre_weight, Tensor? pre_bias, Tensor? ln_weight, Tensor? ln_bias, Tensor? seed"
)
_SETTINGS = (
    "str activation, float scaling, float pre_eps, float eps, float dropout_p, "
    "bool skip_in, bool residual_x, bool residual_skip"
)

compacter_fwd = define(
    f"compacter_fwd(Tensor x, Tensor? skip, {_PARAMETERS}, {_SETTINGS}, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
compacter_bwd = define(
    "compacter_bwd(Tensor dy, Tensor x, Tensor? skip, Tensor q, Tensor? pre_stats, Tensor? post_stats, "
    f"{_PARAMETERS}, {_SETTINGS}, bool[] needs, str backend) -> Tensor[]",
    _backward,
    _backward_fake,
)
