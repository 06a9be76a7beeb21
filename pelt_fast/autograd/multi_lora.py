"""Autograd of batched multi-LoRA.

Saved between forward and backward: x by alias, s = drop(x) Aᵀ (T, ΣR), the seed, and by alias the parameters, the
plan's arrays, ranks, scalings and the row scale. Nothing of size T × in or T × out is new.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops import multi_lora_bwd, multi_lora_fwd, multi_lora_linear_bwd, multi_lora_linear_fwd
from .once import differentiable_once


class MultiLoRASettings(NamedTuple):
    """What is no tensor."""

    projections: int
    plan_arrays: int
    dropout_p: float
    backend: str


class MultiLoRAFunction(torch.autograd.Function):
    """Arguments: settings, seed, x, row_scale, then every A, B, base, rank and scaling, then the plan's arrays."""

    @staticmethod
    def forward(
        ctx: Any,
        settings: MultiLoRASettings,
        seed: Tensor | None,
        x: Tensor,
        row_scale: Tensor | None,
        *tensors: Any,
    ) -> tuple[Tensor, ...]:
        n = settings.projections
        a, b, base, ranks, scaling, plan = _split(tensors, n)
        y, s = multi_lora_fwd(
            *(x, a, b, base, plan, ranks, scaling),
            *(row_scale, settings.dropout_p, seed, settings.backend),
        )
        ctx.save_for_backward(seed, x, row_scale, s, *a, *b, *ranks, *scaling, *plan)
        ctx.settings, ctx.not_saved = settings, ""
        ctx.row_scale_dtype = None if row_scale is None else row_scale.dtype
        return tuple(y)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: Sequence[Any], *dy: Tensor) -> tuple[Any, ...]:
        settings: MultiLoRASettings = ctx.settings
        n = settings.projections
        seed, x, row_scale, s, *tensors = saved
        a, b, ranks, scaling = (tensors[i * n : (i + 1) * n] for i in range(4))
        needs = ctx.needs_input_grad
        of_a, of_b, of_base = (needs[4 + i * n : 4 + (i + 1) * n] for i in range(3))
        dx, da, db, drow_scale = None, [None] * n, [None] * n, None
        if needs[2] or needs[3] or any(of_a) or any(of_b):
            dx, da, db, drow_scale = multi_lora_bwd(
                *(list(dy), x, a, b, s, tensors[4 * n :], ranks, scaling, row_scale),
                *(settings.dropout_p, seed, needs[2], any(of_a), any(of_b), needs[3]),
                settings.backend,
            )
        return (
            None,
            None,
            dx if needs[2] else None,
            None if drow_scale is None or not needs[3] else drow_scale.to(ctx.row_scale_dtype),
            *[g if need else None for g, need in zip(da, of_a, strict=True)],
            *[g if need else None for g, need in zip(db, of_b, strict=True)],
            *[g if need else None for g, need in zip(dy, of_base, strict=True)],
            *[None] * (2 * n + settings.plan_arrays),
        )


class MultiLoRALinearFunction(torch.autograd.Function):
    """Of one projection, added to a frozen linear; neither its weight nor its bias gets a gradient.

    Arguments: settings, seed, x, row_scale, weight, bias, A, B, ranks, scaling, then the plan's arrays.
    """

    @staticmethod
    def forward(
        ctx: Any,
        settings: MultiLoRASettings,
        seed: Tensor | None,
        x: Tensor,
        row_scale: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        *tensors: Tensor,
    ) -> Tensor:
        (a, b, ranks, scaling), plan = ([t] for t in tensors[:4]), tensors[4:]
        y, s = multi_lora_linear_fwd(
            *(x, weight, bias, a, b, plan, ranks, scaling),
            *(row_scale, settings.dropout_p, seed, settings.backend),
        )
        ctx.save_for_backward(seed, x, row_scale, weight, s, *tensors)
        ctx.settings, ctx.not_saved = settings, ""
        ctx.row_scale_dtype = None if row_scale is None else row_scale.dtype
        found: Tensor = y
        return found

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: Sequence[Any], dy: Tensor) -> tuple[Any, ...]:
        settings: MultiLoRASettings = ctx.settings
        seed, x, row_scale, weight, s, *tensors = saved
        a, b, ranks, scaling = ([t] for t in tensors[:4])
        _, _, need_dx, need_drow_scale, _, _, need_da, need_db, *_ = ctx.needs_input_grad
        dx, da, db, drow_scale = multi_lora_linear_bwd(
            *(dy, x, weight, a, b, s, tensors[4:], ranks, scaling, row_scale),
            *(settings.dropout_p, seed, need_dx, need_da, need_db, need_drow_scale),
            settings.backend,
        )
        return (
            None,
            None,
            dx if need_dx else None,
            drow_scale.to(ctx.row_scale_dtype) if need_drow_scale else None,
            None,
            None,
            da[0] if need_da else None,
            db[0] if need_db else None,
            *[None] * (2 + settings.plan_arrays),
        )


def _split(tensors: Sequence[Any], n: int) -> list[Sequence[Any]]:
    """A, B, base, ranks, scaling of n each, and the rest."""
    return [tensors[i * n : (i + 1) * n] for i in range(5)] + [tensors[5 * n :]]
