"""The oracle of batched multi-LoRA as a backend: row by row, with autograd. It runs only when asked for by name.

Half precision is computed in fp32: autograd adds the gradients of rows one by one, in the dtype that it is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import reference
from ...random import keep_scale, philox_mask


def unsupported(problem: Any) -> list[str]:
    """Every problem can run."""
    return []


def priority(problem: Any) -> int:
    """Never chosen automatically."""
    return 0


def _compute(
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
) -> list[Tensor]:
    tokens, wide = x.shape[0], torch.promote_types(x.dtype, torch.float32)
    ids = plan[0][:tokens].tolist()
    found = []
    for i, (a, b, rank, scale) in enumerate(zip(lora_a, lora_b, ranks, scaling, strict=True)):
        keep = None if seed is None else philox_mask(seed, (tokens, x.shape[1]), dropout_p, i)
        found.append(
            reference.multi_lora(
                *(x.to(wide), a.to(wide), b.to(wide), ids),
                rank.clamp(0, a.shape[1]).tolist(),
                scale.tolist(),
                base=None if (given := base[i]) is None else given.to(wide),
                row_scale=None if row_scale is None else row_scale.to(wide),
                dropout_p=dropout_p,
                keep=keep,
            ).to(x.dtype)
        )
    return found


def multi_lora_fwd(
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
    inplace: bool,
) -> tuple[list[Tensor], Tensor]:
    """y[i] (T, out) and s (T, ΣR)."""
    tokens = x.shape[0]
    y = _compute(x, lora_a, lora_b, base, plan, ranks, scaling, row_scale, dropout_p, seed)
    if inplace:
        named = (plan[0][:tokens] < lora_a[0].shape[0])[:, None]
        y = [
            b.copy_(torch.where(named, t, b)) for b, t in zip(base, y, strict=True) if b is not None
        ]
    wide = torch.promote_types(x.dtype, torch.float32)
    s = x.new_zeros((tokens, sum(a.shape[1] for a in lora_a)))
    offset = 0
    for i, a in enumerate(lora_a):
        dropped = x.to(wide)
        if seed is not None:
            keep = philox_mask(seed, (tokens, x.shape[1]), dropout_p, i)
            dropped = torch.where(keep, dropped * keep_scale(dropout_p), 0.0)
        for t, g in enumerate(plan[0][:tokens].tolist()):
            if g < a.shape[0]:
                rank = int(ranks[i][g].clamp(0, a.shape[1]))
                s[t, offset : offset + rank] = dropped[t] @ a[g, :rank].to(wide).T
        offset += a.shape[1]
    return y, s


def multi_lora_bwd(
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
) -> tuple[Tensor | None, list[Tensor], list[Tensor], Tensor | None]:
    """The gradients by autograd through the reference."""
    with torch.enable_grad():
        x, *rest = (t.detach().requires_grad_() for t in (x, *lora_a, *lora_b))
        a, b = rest[: len(lora_a)], rest[len(lora_a) :]
        wide = torch.promote_types(x.dtype, torch.float32)
        scale = None if row_scale is None else row_scale.detach().to(wide).requires_grad_()
        y = _compute(x, a, b, [None] * len(a), plan, ranks, scaling, scale, dropout_p, seed)
        sources = [x, *a, *b] if scale is None else [x, *a, *b, scale]
        if not any(t.requires_grad for t in y):  # no token has an adapter
            y = [t + 0 * x.sum() for t in y]
        found = torch.autograd.grad(y, sources, list(dy), allow_unused=True, materialize_grads=True)
    n = len(a)
    return (
        found[0] if need_dx else None,
        list(found[1 : 1 + n]) if need_da else [],
        list(found[1 + n : 1 + 2 * n]) if need_db else [],
        found[-1] if need_drow_scale else None,
    )
