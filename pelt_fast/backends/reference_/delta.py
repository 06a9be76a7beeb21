"""The oracle as a backend: ``pelt_fast.reference`` with autograd. Slow; it runs only when asked for by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import reference
from ...random import philox_odds


def unsupported(problem: Any) -> list[str]:
    """Every problem can run."""
    return []


def priority(problem: Any) -> int:
    """Never chosen automatically."""
    return 0


def _weight(
    diff: Tensor,
    log_alpha: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    seed: Tensor | None,
    lower: float,
    upper: float,
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(weight.dtype, torch.float32)
    return reference.diff_pruning_weight(
        weight.to(wide),
        diff.to(wide),
        log_alpha.to(wide),
        scale=None if scale is None else scale.to(wide),
        odds=None if seed is None else philox_odds(seed, weight.shape, wide),
        lower=lower,
        upper=upper,
    )


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
    """The weight in ``dtype``, and how many gates are expected to be open."""
    out, count = _weight(diff, log_alpha, weight, scale, seed, lower, upper)
    return out.to(dtype), count


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
    """Gradients by autograd, and the weight in ``dtype``, each where it is needed."""
    leaves: list[Any] = [
        None if t is None else t.detach().requires_grad_(need)
        for t, need in ((diff, need_diff), (log_alpha, need_log_alpha), (scale, need_scale))
    ]
    with torch.enable_grad():
        out, count = _weight(leaves[0], leaves[1], weight, leaves[2], seed, lower, upper)
        outputs = [(t, g.to(t.dtype)) for t, g in ((out, dmade), (count, dcount)) if g is not None]
        wanted = [t for t in leaves if t is not None and t.requires_grad]
        usable = [(t, g) for t, g in outputs if t.requires_grad]
        grads = (
            torch.autograd.grad(
                *([t for t, _ in usable], wanted, [g for _, g in usable]),
                allow_unused=True,
                materialize_grads=True,
            )
            if usable and wanted
            else [torch.zeros_like(t) for t in wanted]
        )
    of = dict(zip(map(id, wanted), grads, strict=True))
    ddiff, dlog_alpha, dscale = (of.get(id(t)) for t in leaves)
    if dscale is not None:
        dscale = dscale.reshape(()).to(out.dtype)
    return ddiff, dlog_alpha, dscale, out.detach().to(dtype) if need_out else None


def masking_fwd(weight: Tensor, scores: Tensor, threshold: float, dtype: torch.dtype) -> Tensor:
    """weight where its score is at least the threshold, else 0, in ``dtype``."""
    return reference.masked_weight(weight, scores, threshold).to(dtype)


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
    """Gradients by autograd, and the weight in ``dtype``, each where it is needed."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    w, s = (t.detach().requires_grad_() for t in (weight, scores))
    dscores, dweight = None, None
    with torch.enable_grad():
        out = reference.masked_weight(w.to(wide), s, threshold)
        if dmade is not None:
            dscores, dweight = torch.autograd.grad(out, (s, w), dmade.to(wide))
    return (
        dscores if need_scores else None,
        dweight if need_weight else None,
        out.detach().to(dtype) if need_out else None,
    )
