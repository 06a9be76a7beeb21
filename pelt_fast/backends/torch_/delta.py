"""Diff pruning and masking as ATen compositions: nothing is kept between the passes but the seed.

The noise costs some hundred passes of integer arithmetic here, as it has to be that of every backend.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...random import philox_odds


def unsupported(problem: Any) -> list[str]:
    """Every problem can run."""
    return []


def priority(problem: Any) -> int:
    """What is left when no kernel of ours can run or is faster."""
    return 10


def _wide(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def _gates(
    log_alpha: Tensor, seed: Tensor | None, lower: float, upper: float, wide: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The sigmoid of a gate, itself, and the probability that it is open."""
    against = torch.exp(-log_alpha.to(wide))
    noisy = against if seed is None else against * philox_odds(seed, log_alpha.shape, wide)
    sigmoid = 1 / (1 + noisy)
    gates = (sigmoid * (upper - lower) + lower).clamp(0, 1)
    return sigmoid, gates, 1 / (1 + against * (-lower / upper))


def _apply(
    weight: Tensor, diff: Tensor, gates: Tensor, scale: Tensor | None, dtype: torch.dtype
) -> Tensor:
    wide = gates.dtype
    change = gates * diff.to(wide)
    return (weight.to(wide) + (change if scale is None else scale.to(wide) * change)).to(dtype)


def diff_pruning_fwd(
    diff: Tensor,
    log_alpha: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    seed: Tensor | None,
    lower: float,
    upper: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The weight in ``dtype``, and how many gates are expected to be open, in the dtype that is computed in."""
    _, gates, is_open = _gates(log_alpha, seed, lower, upper, _wide(weight))
    return _apply(weight, diff, gates, scale, dtype), is_open.sum()


def diff_pruning_bwd(
    diff: Tensor,
    log_alpha: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    seed: Tensor | None,
    dmade: Tensor | None,
    dcount: Tensor | None,
    lower: float,
    upper: float,
    need_diff: bool,
    need_log_alpha: bool,
    need_scale: bool,
    need_out: bool,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of diff, log_alpha and scale, and the weight in ``dtype``, each where it is needed."""
    wide = _wide(weight)
    sigmoid, gates, is_open = _gates(log_alpha, seed, lower, upper, wide)
    factor = 1.0 if scale is None else scale.to(wide)
    g = None if dmade is None else dmade.to(wide)
    ddiff, dlog_alpha, dscale = None, None, None
    if need_diff:
        ddiff = torch.zeros_like(diff) if g is None else (g * gates * factor).to(diff.dtype)
    if need_log_alpha:
        found = torch.zeros_like(gates)
        if dcount is not None:
            found = dcount.to(wide) * (is_open * (1 - is_open))
        if g is not None:
            stretched = sigmoid * (upper - lower) + lower
            slope = sigmoid * (1 - sigmoid) * (upper - lower)
            inside = (stretched >= 0) & (stretched <= 1)
            found = found + torch.where(inside, g * diff.to(wide) * factor, 0.0) * slope
        dlog_alpha = found.to(log_alpha.dtype)
    if need_scale:
        along = gates.new_zeros(()) if g is None else (g * diff.to(wide) * gates).sum()
        dscale = along
    out = _apply(weight, diff, gates, scale, dtype) if need_out else None
    return ddiff, dlog_alpha, dscale, out


def masking_fwd(weight: Tensor, scores: Tensor, threshold: float, dtype: torch.dtype) -> Tensor:
    """weight where its score is at least the threshold, else 0, in ``dtype``."""
    return torch.where(scores >= threshold, weight, 0.0).to(dtype)


def masking_bwd(
    weight: Tensor,
    scores: Tensor,
    dmade: Tensor | None,
    threshold: float,
    need_scores: bool,
    need_weight: bool,
    need_out: bool,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of scores, straight through, and of weight, and the weight in ``dtype``, each where it is needed."""
    dscores, dweight = None, None
    if dmade is not None:
        wide = _wide(weight)
        if need_scores:
            dscores = (dmade.to(wide) * weight.to(wide)).to(scores.dtype)
        if need_weight:
            dweight = torch.where(scores >= threshold, dmade, 0.0).to(weight.dtype)
    out = masking_fwd(weight, scores, threshold, dtype) if need_out else None
    return dscores, dweight, out
