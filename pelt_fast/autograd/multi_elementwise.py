"""Autograd of IA³ and BitFit with an adapter for each token.

Saved are x and the scales by alias, each only where a gradient that is asked for reads it, and the plan's arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops import multi_elementwise_bwd, multi_elementwise_fwd
from .once import differentiable_once


class MultiElementwiseFunction(torch.autograd.Function):
    """Arguments: x, scales, biases, backend, then the plan's arrays."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scales: Tensor | None,
        biases: Tensor | None,
        backend: str,
        *plan: Tensor,
    ) -> Tensor:
        y: Tensor = multi_elementwise_fwd(x, scales, biases, list(plan), backend)
        needs = ctx.needs_input_grad
        ctx.save_for_backward(x if needs[1] else None, scales if needs[0] else None, *plan)
        ctx.backend, ctx.not_saved = backend, ""
        ctx.dtypes = [None if t is None else t.dtype for t in (scales, biases)]
        return y

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: Sequence[Any], dy: Tensor) -> tuple[Any, ...]:
        x, scales, *plan = saved
        need_dx, need_dscales, need_dbiases = ctx.needs_input_grad[:3]
        same = scales is None  # then dx is dy
        dx, dscales, dbiases = multi_elementwise_bwd(
            *(dy, x, scales, plan, need_dx and not same, need_dscales, need_dbiases, ctx.backend)
        )
        return (
            (dy if same else dx) if need_dx else None,
            dscales.to(ctx.dtypes[0]) if need_dscales else None,
            dbiases.to(ctx.dtypes[1]) if need_dbiases else None,
            None,
            *[None] * len(plan),
        )
