"""The oracle as a backend: ``pelt_fast.reference`` with autograd. Slow; it runs only when asked for by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import reference


def unsupported(problem: Any) -> list[str]:
    """Every problem can run."""
    return []


def priority(problem: Any) -> int:
    """Never chosen automatically."""
    return 0


def multi_elementwise_fwd(
    x: Tensor, scales: Tensor | None, biases: Tensor | None, plan: Sequence[Tensor]
) -> Tensor:
    """x (T, features) -> y."""
    wide = torch.promote_types(x.dtype, torch.float32)
    scales, biases = (None if t is None else t.to(wide) for t in (scales, biases))
    ids = plan[0][: x.shape[0]].tolist()
    return reference.multi_elementwise(x.to(wide), scales, biases, ids).to(x.dtype)


def multi_elementwise_bwd(
    dy: Tensor,
    x: Tensor | None,
    scales: Tensor | None,
    plan: Sequence[Tensor],
    need_dx: bool,
    need_dscales: bool,
    need_dbiases: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients by autograd; what is not needed may be missing."""
    wide = torch.promote_types(dy.dtype, torch.float32)
    shape = (plan[2].shape[0] - 2, dy.shape[1])
    ones, zeros = dy.new_ones(shape, dtype=wide), dy.new_zeros(shape, dtype=wide)
    with torch.enable_grad():
        rows, scale, bias = (
            t.detach().to(wide).requires_grad_()
            for t in (dy if x is None else x, ones if scales is None else scales, zeros)
        )
        y = reference.multi_elementwise(rows, scale, bias, plan[0][: dy.shape[0]].tolist())
        dx, dscales, dbiases = torch.autograd.grad(
            y, (rows, scale, bias), dy.to(wide), allow_unused=True, materialize_grads=True
        )
    return (
        dx.to(dy.dtype) if need_dx else None,
        dscales if need_dscales else None,
        dbiases if need_dbiases else None,
    )
