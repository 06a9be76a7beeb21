"""A weight out of a frozen one and gates: diff pruning (Guo et al., 2021) and masking (Zhao et al., 2020)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def diff_pruning_weight(
    weight: Tensor,
    diff: Tensor,
    log_alpha: Tensor,
    *,
    scale: Tensor | None,
    odds: Tensor | None,
    lower: float,
    upper: float,
) -> tuple[Tensor, Tensor]:
    """weight + scale · z ⊙ diff with hard concrete gates z, and how many of them are expected to be open.

    weight, diff, log_alpha of one shape and dtype; ``scale`` one number or None; ``odds`` is (1 - u) / u of the noise u
    in (0, 1), None for gates without noise.
    """
    logits = log_alpha if odds is None else log_alpha - odds.log()
    gates = (torch.sigmoid(logits) * (upper - lower) + lower).clamp(0, 1)
    change = gates * diff
    if scale is not None:
        change = scale * change
    ratio = torch.tensor(-lower / upper, dtype=log_alpha.dtype, device=log_alpha.device)
    return weight + change, torch.sigmoid(log_alpha - ratio.log()).sum()


def masked_weight(weight: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """weight where its score is at least the threshold, else 0; a score's gradient is its mask's (straight through)."""
    return weight * _Mask.apply(scores, threshold, weight.dtype)


class _Mask(torch.autograd.Function):
    """scores >= threshold, through which gradients pass as they are."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, threshold: float, dtype: torch.dtype) -> Tensor:
        ctx.dtype = scores.dtype
        return (scores >= threshold).to(dtype)

    @staticmethod
    def backward(ctx: Any, dmask: Tensor) -> tuple[Tensor, None, None]:
        return dmask.to(ctx.dtype), None, None
