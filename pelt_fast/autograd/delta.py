"""Autograd of diff pruning and masking.

Saved between forward and backward: x, the parameters and the frozen weight by alias, and the seed. The linears make
their weight again in backward, in the pass that makes the gradients: nothing of a weight's size is new in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import diff_pruning_bwd, diff_pruning_fwd, masking_bwd, masking_fwd
from .once import differentiable_once


class DiffPruningFunction(torch.autograd.Function):
    """The weight and the count of open gates."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        diff: Tensor,
        log_alpha: Tensor,
        scale: Tensor | None,
        seed: Tensor | None,
        lower: float,
        upper: float,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        settings = (lower, upper, weight.dtype, backend)
        out, count = diff_pruning_fwd(diff, log_alpha, weight, scale, seed, *settings)
        ctx.save_for_backward(weight, diff, log_alpha, scale, seed)
        ctx.set_materialize_grads(False)
        ctx.settings, ctx.not_saved = settings, ""
        return out, count

    @staticmethod
    @differentiable_once
    def backward(
        ctx: Any, saved: Sequence[Any], dmade: Tensor | None, dcount: Tensor | None
    ) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad
        found = _diff_pruning(saved, dmade, dcount, needs[1:4], False, ctx.settings)
        dweight = dmade if needs[0] else None
        return (dweight, *found[:3], None, None, None, None)


class DiffPruningLinearFunction(torch.autograd.Function):
    """x times the weight, and the count of open gates."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        diff: Tensor,
        log_alpha: Tensor,
        scale: Tensor | None,
        seed: Tensor | None,
        lower: float,
        upper: float,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        settings = (lower, upper, x.dtype, backend)
        made, count = diff_pruning_fwd(diff, log_alpha, weight, scale, seed, *settings)
        y = F.linear(x, made, None if bias is None else bias.to(x.dtype))
        ctx.save_for_backward(x, weight, diff, log_alpha, scale, seed)
        ctx.set_materialize_grads(False)
        ctx.settings, ctx.not_saved = settings, ""
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y, count

    @staticmethod
    @differentiable_once
    def backward(
        ctx: Any, saved: Sequence[Any], dy: Tensor | None, dcount: Tensor | None
    ) -> tuple[Any, ...]:
        x, *of_weight = saved
        of_x, of_frozen, of_bias, *of_deltas = ctx.needs_input_grad[:6]
        dmade = _of_weight(dy, x) if of_frozen or any(of_deltas) else None
        need_made = of_x and dy is not None
        found = _diff_pruning(of_weight, dmade, dcount, of_deltas, need_made, ctx.settings)
        dx = dy @ found[3] if dy is not None and of_x else None
        dweight = dmade.to(of_weight[0].dtype) if dmade is not None and of_frozen else None
        dbias = _of_bias(dy, ctx.bias_dtype) if of_bias else None
        return (dx, dweight, dbias, *found[:3], None, None, None, None)


class MaskedLinearFunction(torch.autograd.Function):
    """x times the weight where its scores reach the threshold."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scores: Tensor,
        threshold: float,
        backend: str,
    ) -> Tensor:
        made = masking_fwd(weight, scores, threshold, x.dtype, backend)
        ctx.save_for_backward(x, weight, scores)
        ctx.threshold, ctx.backend, ctx.not_saved = threshold, backend, ""
        ctx.bias_dtype = None if bias is None else bias.dtype
        return F.linear(x, made, None if bias is None else bias.to(x.dtype))

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: Sequence[Any], dy: Tensor) -> tuple[Any, ...]:
        x, weight, scores = saved
        of_x, of_weight, of_bias, of_scores = ctx.needs_input_grad[:4]
        dscores, dweight, dx = None, None, None
        if of_x or of_weight or of_scores:
            dmade = _of_weight(dy, x) if of_weight or of_scores else None
            dscores, dweight, made = masking_bwd(
                *(weight, scores, dmade, ctx.threshold, of_scores, of_weight, of_x),
                *(x.dtype, ctx.backend),
            )
            dx = dy @ made if of_x else None
        return (
            dx,
            dweight if of_weight else None,
            _of_bias(dy, ctx.bias_dtype) if of_bias else None,
            dscores if of_scores else None,
            None,
            None,
        )


def _diff_pruning(
    saved: Sequence[Any],
    dmade: Tensor | None,
    dcount: Tensor | None,
    needs: Sequence[bool],
    need_made: bool,
    settings: tuple[Any, ...],
) -> tuple[Any, ...]:
    """Gradients of diff, log_alpha and scale, and the weight, each where it is needed."""
    weight, diff, log_alpha, scale, seed = saved
    lower, upper, dtype, backend = settings
    wanted = (*needs, need_made)
    if not any(wanted) or (dmade is None and dcount is None and not need_made):
        return (None, None, None, None)
    found = diff_pruning_bwd(
        *(diff, log_alpha, weight, scale, seed, dmade, dcount),
        *(lower, upper, *wanted, dtype, backend),
    )
    ddiff, dlog_alpha, dscale, made = (
        g if need else None for g, need in zip(found, wanted, strict=True)
    )
    if dscale is not None:
        dscale = dscale.reshape(scale.shape).to(scale.dtype)
    return ddiff, dlog_alpha, dscale, made


def _of_weight(dy: Tensor | None, x: Tensor) -> Tensor | None:
    """dyᵀ x over all rows, (out, in)."""
    if dy is None:
        return None
    return dy.reshape(-1, dy.shape[-1]).T @ x.reshape(-1, x.shape[-1])


def _of_bias(dy: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The sum of dy over all rows, (out,)."""
    if dy is None:
        return None
    wide = torch.promote_types(dy.dtype, torch.float32)
    return dy.reshape(-1, dy.shape[-1]).sum(0, dtype=wide).to(dtype)
