"""Operators of IA³ and BitFit with an adapter for each token; see ``pelt_fast/ops/lora.py`` for what an operator is.

``plan`` is the first three of ``MultiAdapterPlan.arrays``: bucket of each token, tokens by bucket, where each begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..dispatch import MultiElementwiseProblem, arch_of, asked_for, select
from .library import define
from .rows import from_rows, to_rows


def problem_of(
    op: str, rows: Tensor, tokens: int, adapters: int, *, scaled: bool
) -> MultiElementwiseProblem:
    """Describes a call; ``rows`` is x or dy."""
    device = rows.device
    return MultiElementwiseProblem(
        op=op,
        device_type=device.type,
        arch=arch_of(device.type, device.index),
        dtype=rows.dtype,
        tokens=tokens,
        adapters=adapters,
        features=rows.shape[-1],
        scaled=scaled,
    )


def _run(op: str, rows: Tensor, plan: Sequence[Tensor], backend: str, *, scaled: bool) -> Any:
    adapters = plan[2].shape[0] - 2
    problem = problem_of(op, rows, rows.shape[0], adapters, scaled=scaled)
    return getattr(select(problem, backend or asked_for()).module, op)


def _forward(
    x: Tensor,
    scales: Tensor | None,
    biases: Tensor | None,
    plan: Sequence[Tensor],
    backend: str,
) -> Tensor:
    rows = to_rows(x)
    if rows.shape[0] == 0:
        return x.new_empty(x.shape)
    run = _run("multi_elementwise_fwd", rows, plan, backend, scaled=scales is not None)
    return from_rows(run(rows, scales, biases, plan), tuple(x.shape))


def _forward_fake(
    x: Tensor,
    scales: Tensor | None,
    biases: Tensor | None,
    plan: Sequence[Tensor],
    backend: str,
) -> Tensor:
    return x.new_empty(x.shape)


def _backward(
    dy: Tensor,
    x: Tensor | None,
    scales: Tensor | None,
    plan: Sequence[Tensor],
    need_dx: bool,
    need_dscales: bool,
    need_dbiases: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    found = _backward_fake(dy, x, scales, plan, need_dx, need_dscales, need_dbiases, backend)
    if prod(dy.shape[:-1]) == 0:
        return found[0], found[1].zero_(), found[2].zero_()
    rows = to_rows(dy)
    run = _run("multi_elementwise_bwd", rows, plan, backend, scaled=scales is not None)
    dx, dscales, dbiases = run(
        rows, None if x is None else to_rows(x), scales, plan, need_dx, need_dscales, need_dbiases
    )
    return (
        from_rows(dx, tuple(dy.shape)) if need_dx else found[0],
        dscales if need_dscales else found[1],
        dbiases if need_dbiases else found[2],
    )


def _backward_fake(
    dy: Tensor,
    x: Tensor | None,
    scales: Tensor | None,
    plan: Sequence[Tensor],
    need_dx: bool,
    need_dscales: bool,
    need_dbiases: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(dy.dtype, torch.float32)
    shape = (plan[2].shape[0] - 2, dy.shape[-1])
    dscales, dbiases = (
        dy.new_empty(shape if need else 0, dtype=wide) for need in (need_dscales, need_dbiases)
    )
    return dy.new_empty(dy.shape if need_dx else 0), dscales, dbiases


multi_elementwise_fwd = define(
    "multi_elementwise_fwd(Tensor x, Tensor? scales, Tensor? biases, Tensor[] plan, str backend) -> Tensor",
    _forward,
    _forward_fake,
)
multi_elementwise_bwd = define(
    "multi_elementwise_bwd(Tensor dy, Tensor? x, Tensor? scales, Tensor[] plan, bool need_dx, bool need_dscales, "
    "bool need_dbiases, str backend) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
