"""Operators of batched multi-LoRA; see ``pelt_fast/ops/lora.py`` for what an operator does here.

n projections share x, the plan and the row scale: lists have one entry for each. ``plan`` is
``MultiAdapterPlan.arrays``. One operator is not functional: ``multi_lora_add_`` changes ``base``.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import MultiLoRAProblem, arch_of, asked_for, select
from .library import define
from .rows import from_rows, to_rows


def problem_of(
    op: str,
    rows: Tensor,
    tokens: int,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    *,
    row_scale: bool,
    dropout: bool,
) -> MultiLoRAProblem:
    """Describes a call; ``rows`` is x or a dy."""
    device = rows.device
    return MultiLoRAProblem(
        op=op,
        device_type=device.type,
        arch=arch_of(device.type, device.index),
        dtype=rows.dtype,
        adapter_dtypes=tuple([p.dtype for p in (*lora_a, *lora_b)]),
        tokens=tokens,
        adapters=lora_a[0].shape[0],
        in_features=lora_a[0].shape[2],
        out_features=tuple([b.shape[1] for b in lora_b]),
        rank=max([a.shape[1] for a in lora_a]),
        row_scale=row_scale,
        dropout=dropout,
    )


def _forward(
    x: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    base: Sequence[Tensor | None],
    plan: Sequence[Tensor],
    ranks: Sequence[Tensor],
    scaling: Sequence[Tensor],
    row_scale: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
) -> tuple[list[Tensor], Tensor]:
    rows = to_rows(x)
    if rows.shape[0] == 0:
        return _forward_fake(
            *(x, lora_a, lora_b, base, plan, ranks, scaling, row_scale, dropout_p, seed, backend)
        )
    bases = [None if b is None else to_rows(b) for b in base]
    y, s = _run(
        *(rows, lora_a, lora_b, bases, plan, ranks, scaling, row_scale, dropout_p, seed, backend),
        inplace=False,
    )
    return [from_rows(t, (*x.shape[:-1], t.shape[1])) for t in y], s


def _run(
    rows: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    base: Sequence[Tensor | None],
    plan: Sequence[Tensor],
    ranks: Sequence[Tensor],
    scaling: Sequence[Tensor],
    row_scale: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
    *,
    inplace: bool,
) -> tuple[list[Tensor], Tensor]:
    problem = problem_of(
        *("multi_lora_fwd", rows, rows.shape[0], lora_a, lora_b),
        row_scale=row_scale is not None,
        dropout=seed is not None,
    )
    run = select(problem, backend or asked_for()).module
    y, s = run.multi_lora_fwd(
        *(rows, lora_a, lora_b, base, plan, ranks, scaling, row_scale, dropout_p, seed, inplace)
    )
    return y, s


def _forward_fake(
    x: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    base: Sequence[Tensor | None],
    plan: Sequence[Tensor],
    ranks: Sequence[Tensor],
    scaling: Sequence[Tensor],
    row_scale: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
) -> tuple[list[Tensor], Tensor]:
    y = [x.new_empty((*x.shape[:-1], b.shape[1])) for b in lora_b]
    return y, x.new_empty((prod(x.shape[:-1]), sum([a.shape[1] for a in lora_a])))


def _add(
    x: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    base: Sequence[Tensor],
    plan: Sequence[Tensor],
    ranks: Sequence[Tensor],
    scaling: Sequence[Tensor],
    row_scale: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
) -> None:
    rows = to_rows(x)
    if rows.shape[0]:
        bases = [b.view(-1, b.shape[-1]) for b in base]
        _run(
            *(rows, lora_a, lora_b, bases, plan, ranks, scaling),
            *(row_scale, dropout_p, seed, backend),
            inplace=True,
        )


def _add_fake(
    x: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    base: Sequence[Tensor],
    plan: Sequence[Tensor],
    ranks: Sequence[Tensor],
    scaling: Sequence[Tensor],
    row_scale: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
) -> None:
    return None


def _backward(
    dy: Sequence[Tensor],
    x: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    s: Tensor,
    plan: Sequence[Tensor],
    ranks: Sequence[Tensor],
    scaling: Sequence[Tensor],
    row_scale: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    need_dx: bool,
    need_da: bool,
    need_db: bool,
    need_drow_scale: bool,
    backend: str,
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    dy = [d.to_dense() if d.layout is not torch.strided else d for d in dy]
    rows = [to_rows(d) for d in dy]
    tokens = rows[0].shape[0]
    needs = (need_dx, need_da, need_db, need_drow_scale)
    if tokens == 0:  # sums of nothing
        dx, da, db, drow_scale = _gradients_like(x, lora_a, lora_b, needs)
        return dx, [g.zero_() for g in da], [g.zero_() for g in db], drow_scale
    problem = problem_of(
        *("multi_lora_bwd", rows[0], tokens, lora_a, lora_b),
        row_scale=row_scale is not None,
        dropout=seed is not None,
    )
    run = select(problem, backend or asked_for()).module
    dx, da, db, drow_scale = run.multi_lora_bwd(
        *(rows, to_rows(x), lora_a, lora_b, s, plan, ranks, scaling, row_scale, dropout_p, seed),
        *needs,
    )
    return (
        from_rows(dx, x.shape) if need_dx else x.new_empty(0),
        _like(da, lora_a) if need_da else [a.new_empty(0) for a in lora_a],
        _like(db, lora_b) if need_db else [b.new_empty(0) for b in lora_b],
        drow_scale if need_drow_scale else _scales(x, 0),
    )


def _like(gradients: Sequence[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
    """In the order of the parameters' memory, as autograd keeps a gradient without a copy of it."""
    found = []
    for gradient, p in zip(gradients, parameters, strict=True):
        fits = gradient.stride() == p.stride()
        if not fits:  # a parameter that is dense in no order has its gradient in some order
            fits = gradient.stride() == torch.empty_like(p, device="meta").stride()
        found.append(gradient if fits else torch.empty_like(p).copy_(gradient))
    return found


def _scales(x: Tensor, size: int) -> Tensor:
    return x.new_empty(size, dtype=torch.promote_types(x.dtype, torch.float32))


def _gradients_like(
    x: Tensor, lora_a: Sequence[Tensor], lora_b: Sequence[Tensor], needs: Sequence[bool]
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    """Uninitialised gradients; empty where not needed."""
    need_dx, need_da, need_db, need_drow_scale = needs
    return (
        x.new_empty(x.shape if need_dx else 0),
        [torch.empty_like(a) if need_da else a.new_empty(0) for a in lora_a],
        [torch.empty_like(b) if need_db else b.new_empty(0) for b in lora_b],
        _scales(x, prod(x.shape[:-1]) if need_drow_scale else 0),
    )


def _backward_fake(
    dy: Sequence[Tensor],
    x: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    s: Tensor,
    plan: Sequence[Tensor],
    ranks: Sequence[Tensor],
    scaling: Sequence[Tensor],
    row_scale: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    need_dx: bool,
    need_da: bool,
    need_db: bool,
    need_drow_scale: bool,
    backend: str,
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    return _gradients_like(x, lora_a, lora_b, (need_dx, need_da, need_db, need_drow_scale))


def _linear_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    plan: Sequence[Tensor],
    ranks: Sequence[Tensor],
    scaling: Sequence[Tensor],
    row_scale: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    base = F.linear(x, weight, bias)
    y, s = _forward(
        *(x, lora_a, lora_b, [base], plan, ranks, scaling, row_scale, dropout_p, seed, backend)
    )
    return y[0], s


def _linear_forward_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    plan: Sequence[Tensor],
    ranks: Sequence[Tensor],
    scaling: Sequence[Tensor],
    row_scale: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    y, s = _forward_fake(
        *(x, lora_a, lora_b, [None], plan, ranks, scaling, row_scale, dropout_p, seed, backend)
    )
    return y[0], s


def _linear_backward(
    dy: Tensor, x: Tensor, weight: Tensor, *rest: Any
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    dx, da, db, drow_scale = _backward([dy], x, *rest)
    return dx.add_(dy.matmul(weight)) if dx.numel() else dx, da, db, drow_scale


def _linear_backward_fake(
    dy: Tensor, x: Tensor, weight: Tensor, *rest: Any
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    return _backward_fake([dy], x, *rest)


_REST = "Tensor[] plan, Tensor[] ranks, Tensor[] scaling, Tensor? row_scale, float dropout_p, Tensor? seed"

multi_lora_fwd = define(
    f"multi_lora_fwd(Tensor x, Tensor[] lora_a, Tensor[] lora_b, Tensor?[] base, {_REST}, str backend) "
    "-> (Tensor[], Tensor)",
    _forward,
    _forward_fake,
)
multi_lora_add_ = define(
    f"multi_lora_add_(Tensor x, Tensor[] lora_a, Tensor[] lora_b, Tensor(a!)[] base, {_REST}, str backend) -> ()",
    _add,
    _add_fake,
)
multi_lora_bwd = define(
    f"multi_lora_bwd(Tensor[] dy, Tensor x, Tensor[] lora_a, Tensor[] lora_b, Tensor s, {_REST}, bool need_dx, "
    "bool need_da, bool need_db, bool need_drow_scale, str backend) -> (Tensor, Tensor[], Tensor[], Tensor)",
    _backward,
    _backward_fake,
)
# one projection with the frozen linear below it: on a CPU in one pass
multi_lora_linear_fwd = define(
    f"multi_lora_linear_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor[] lora_a, Tensor[] lora_b, {_REST}, "
    "str backend) -> (Tensor, Tensor)",
    _linear_forward,
    _linear_forward_fake,
)
multi_lora_linear_bwd = define(
    f"multi_lora_linear_bwd(Tensor dy, Tensor x, Tensor weight, Tensor[] lora_a, Tensor[] lora_b, Tensor s, {_REST}, "
    "bool need_dx, bool need_da, bool need_db, bool need_drow_scale, str backend) "
    "-> (Tensor, Tensor[], Tensor[], Tensor)",
    _linear_backward,
    _linear_backward_fake,
)
